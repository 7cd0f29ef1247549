"""How a job is started, restarted and ended: the launchers behind launch/*.sh and slurm/*.sh. Imports no torch.

Reading order: settings (what the environment asks for), policy (what an ending means: done, give up, start again),
agent (torchrun as a child, from its start to its end), local (one machine), multinode (several machines without a
scheduler), slurm (what the batch script asks).

It may import every room but training.
"""
