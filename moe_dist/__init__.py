"""Distributed training of Mixture-of-Experts language models with clustered, structurally compressed experts."""

__version__ = "0.1.0"
