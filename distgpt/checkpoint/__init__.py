"""Save, commit, verify, load and keep checkpoints.

Reading order: manifest (what a checkpoint is on disk), checkpointer (save and restore one run), staging (the copy in
memory), writer (the share of one rank), store (how rank 0 changes the directory), index and reader (tensors back from a
file that is not trusted), choice (the checkpoint that a command reads), compatibility (is it of this run?), chain
(where it comes from, and the one before it), interval (when to save).

It may import run, distributed, health, model, corpus and the modules beside the rooms.
"""
