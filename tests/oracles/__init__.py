"""Slow, readable definitions that tests hold the code against."""
