"""Checks before a run: is each machine fit to train, and do the hosts of a job fit together?

Reading order: finding (the result of a check), machine (one machine, its data and its run directory), equality (what
must be equal on all hosts of a job), hosts (all hosts, and the connections between them), links (the bandwidth between
ranks), network (routes and ports of this host).

It may import every room but training and launch.
"""
