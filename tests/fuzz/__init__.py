"""Readers of everything that comes from outside, on damaged and random input (`make fuzz`)."""
