"""Checks of an environment before a long run."""
