"""Benchmark of the cost of more experts."""
