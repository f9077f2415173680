"""Counting of the collectives of any torch program, from outside of it."""
