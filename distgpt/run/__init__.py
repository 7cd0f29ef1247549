"""A run directory, and one process that works in it, from its start to its exit code. Imports no torch.

Reading order: paths (the files of a run directory), exit_report (exit.json), lock (who may write), outcome (the exit
code and the line for what ended a run), session (signals, lock, log and exit code of one rank).

It may import only the modules beside the rooms.
"""
