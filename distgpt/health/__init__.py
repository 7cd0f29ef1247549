"""Detection of hangs, slow ranks and bad steps while a run trains.

Reading order: watchdog (no progress: name the rank, end all), diagnosis (which ranks hang, and where), backstop (a
process that ends a rank whose watchdog cannot run), stragglers (name slow ranks), outliers (steps whose loss or
gradient norm is out of line).

It may import run, distributed, model, corpus and the modules beside the rooms.
"""
