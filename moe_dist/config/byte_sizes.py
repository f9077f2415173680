"""Bytes of numbers, for what predicts memory and traffic without torch."""

FLOAT32, INT32, INT64 = 4, 4, 8
MOMENTS = 8
"""AdamW's two float32 moments of a weight."""
