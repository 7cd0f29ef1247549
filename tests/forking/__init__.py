"""Python commands as forks of a process that has torch imported, which costs two seconds of a core at each real start.

A fork is a process like any other: it has its own id, parent, signals, files and exit code. Files: `program` makes a
fork behave as `python -m MODULE`, `server` starts them for the tests, `ranks` lets torchrun start its ranks so, and
`sitecustomize` brings that to a torchrun which a shell script starts.
"""
