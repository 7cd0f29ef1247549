"""Launchers: start a job, start it again, end it, for launch/*.sh and slurm/*.sh. Imports no torch.

Reading order: settings (the environment), policy (done, give up or start again), agent (torchrun as a child, from its
start to its end), local (one machine), multinode (several machines without a scheduler), slurm (the decisions of the
batch script).

It may import every room but training.
"""
