"""Checks before a run: is each machine fit to train, and do the hosts of a job fit together?

Reading order: finding (the result of a check), machine (one machine, its data and its run directory), hosts (all hosts
of a job), links (the bandwidth between ranks), network (routes and ports of this host).

It may import every room but training and launch.
"""
