"""Random generators for initial values, which depend on the parameter and not on the rank that holds it."""

import hashlib

import torch

SHARED = -1
"""Index for equal initial values of all bases, or of all standard experts."""


def generator(seed: int, layer: int, what: str, index: int) -> torch.Generator:
    """Return a CPU generator for the parameter of kind `what` and number `index` of a layer."""
    digest = hashlib.sha256(f"{seed}/{layer}/{what}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
