"""Benchmarks of layers, steps, memory, precision, re-clustering and traffic."""
