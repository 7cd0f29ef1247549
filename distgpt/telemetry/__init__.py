"""What a person sees of a run. The room writes and shows; it decides nothing.

Reading order: progress (times the steps and hands out what was measured), console, metrics (metrics.jsonl), tensorboard
(event files), goodput (where the time went), plots (the loss curve), peaks (the speed that a device could reach).

It may import run, distributed, model, corpus and the modules beside the rooms.
"""
