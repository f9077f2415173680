"""Scaling studies: the same training over a grid of ranks and settings, repeated and resumable."""
