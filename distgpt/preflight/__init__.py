"""Do the machines of a job fit together, and is each of them fit to train?

Reading order: finding (the result of a check), machine (one machine, its data and its run directory), hosts (all hosts
of a job), links (how fast ranks reach each other), network (how this host reaches the others).

It may import every room but training and launch.
"""
