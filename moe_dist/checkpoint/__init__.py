"""Checkpoints: sharded, written while training goes on, committed whole, read by any number of ranks."""
