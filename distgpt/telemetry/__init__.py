"""The output of a run for people: console lines, files and plots. This room only writes; it decides nothing.

Reading order: progress (times the steps and passes the measurements on), console, metrics (metrics.jsonl), step_lines
(reads it and samples.jsonl), tensorboard (event files), dashboard (tags and layout there), goodput (how the time was
spent), plots (the loss curve), owned_files (writes that an earlier owner of the run directory cannot damage), peaks
(the peak speed of a device), profiling (a trace of some steps).

It may import run, distributed, model, corpus and the modules beside the rooms.
"""
