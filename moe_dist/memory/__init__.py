"""Experts whose weights and training state are larger than the device: tiers, a budget, and what is where."""
