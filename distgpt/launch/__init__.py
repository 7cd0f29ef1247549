"""Start, restart and end a job: the launchers behind launch/*.sh and slurm/*.sh. Imports no torch.

Reading order: settings (variables of the environment, options of torchrun), policy (the meaning of an ending: done,
give up, start again), agent (torchrun as a child, from its start to its end), local (one machine), multinode (several
hosts without a scheduler), slurm (answers for the batch scripts).

It may import every room but training.
"""
