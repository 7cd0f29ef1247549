"""Start, restart and end a job: the launchers behind launch/*.sh and slurm/*.sh. Imports no torch.

Reading order: settings (environment variables and torchrun's options), policy (what follows the end of an attempt:
done, give up, or start again), agent (run torchrun as a child process), local (one machine), sweep (several runs on it,
one after the other), multinode (several hosts without a scheduler), slurm (the decisions of the batch scripts).

It may import every room but training.
"""
