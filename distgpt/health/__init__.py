"""What can go wrong while a run trains.

Reading order: watchdog (no progress: name the rank, end all), diagnosis (what a hanging rank can say), backstop (a
process that ends a rank whose watchdog cannot run), stragglers (name slow ranks), outliers (losses and gradient norms
that are out of line).

It may import run, distributed, model, corpus and the modules beside the rooms.
"""
