"""Plans of runs: memory, bytes sent, time and cost before a run is queued, and the error of a plan once it trains.

Reading order: devices (memory, links and the assumed MFU of named devices), traffic (bytes that a step sends), layouts
(memory and time of each strategy), forecast (all figures of a run, the compute-optimal size for a budget, the best
layout and its command), text (the tables that people read), grade (a run compares itself with its plan).

It may import checkpoint, telemetry and the rooms below them.
"""
