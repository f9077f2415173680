"""Training loop and its callbacks: checkpoints, metrics, resume, preemption, watchdog."""
