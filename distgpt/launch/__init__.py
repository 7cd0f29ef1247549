"""How a job is started, restarted and ended: `python -m distgpt.launch local|nodes|slurm`. Imports no torch.

Reading order: policy (what an ending means: done, give up or start again), agent (run torchrun as a child and pass
signals on), local (one machine), nodes (several hosts without a scheduler), slurm (what slurm/train.sh asks).

It may import every room but training, and no command.
"""
