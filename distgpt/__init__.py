"""Train a GPT from scratch on your own text: the same command on a laptop, one GPU or a Slurm cluster."""

__version__ = "0.1.0"
