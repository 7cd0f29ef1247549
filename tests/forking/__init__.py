"""Run Python commands as forks of a process that has already imported torch, which takes two CPU seconds.

A fork is a process like any other: it has its own id, parent, signals, files and exit code. Files: `program` makes a
fork behave as `python -m MODULE`; `server` forks on request, and `client` requests that for the tests; `children` makes
torchrun fork its ranks, and a launcher its torchrun; `threads` forks while other threads sleep; `relay` and
`hook/sitecustomize.py` fork a torchrun or launcher that a shell script starts.
"""
