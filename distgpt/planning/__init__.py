"""Plans of runs before they are queued: memory, bytes on the wire, time, cost; and how right they were.

In reading order: devices (memory, links and the assumed MFU of named devices), traffic (bytes that a step sends),
layouts (memory and time of each strategy), forecast (all figures of a run, the compute-optimal size for a budget, the
best layout and its command), text (the figures as people read them), grade (a run compares itself with its plan).

May import the rooms that training rests on: checkpoint, telemetry, and those below them.
"""
