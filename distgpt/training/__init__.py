"""The parts that train, evaluate, replay and verify share.

Reading order: startup (checks, plan and data before the first step), summary (the description of a run, and warnings),
step (gradients of a global batch, then the update), cross_check (ranks compute each other's gradients), figures (loss
and norm of a step, read without a wait), step_report (shows and records a step), evaluation (the validation loss, a
sample of text), multiple_choice (questions, scored by likelihood), text (texts that a model writes, and where they
end), rerun (steps of a run, taken again), audit (the checkpoints of a run, checked).

It may import every room but preflight, reporting and launch.
"""
