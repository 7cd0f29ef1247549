"""What the commands that compute share.

Reading order: startup (checks and words before the first step), step (gradients of a global batch, then the update),
evaluation (the validation loss, a sample of text).

It may import every room but preflight and launch.
"""
