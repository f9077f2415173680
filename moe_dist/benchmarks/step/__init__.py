"""Benchmark of whole training steps, divided into parts."""
