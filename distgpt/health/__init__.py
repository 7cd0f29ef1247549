"""Detection of hangs, slow ranks and bad steps while a run trains.

Reading order: watchdog (ends all ranks if one makes no progress, and names it), diagnosis (which ranks hang, and
where), backstop (a process that ends a rank whose watchdog cannot run), stragglers (names slow ranks), outliers (finds
steps whose loss or gradient norm is far too high).

It may import run, distributed, model, corpus and the modules beside the rooms.
"""
