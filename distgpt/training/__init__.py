"""Parts that the commands share.

Reading order: startup (checks and set-up before the first step), summary (the lines that describe a run), step
(gradients of a global batch, then the update), evaluation (the validation loss, a sample of text), report (what
follows a step: figures, slow ranks, the time of the next save).

It may import every room but preflight and launch.
"""
