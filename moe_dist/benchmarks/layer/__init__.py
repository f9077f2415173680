"""Benchmarks of feed-forward layers: ours beside those of other libraries, in one process and on ranks."""
