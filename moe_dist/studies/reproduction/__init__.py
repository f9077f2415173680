"""Reproduction of the paper's table: every kind of layer trained on the same tokens and evaluated."""
