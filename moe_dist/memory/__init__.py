"""Offload of experts whose weights and training state exceed the device: memory tiers, budgets and block caches."""
