"""Random generators whose draws depend on what is initialised, never on which rank holds it."""

import hashlib

import torch

SHARED = -1
"""Index of a draw that all bases, or all standard experts, start from."""


def generator(seed: int, layer: int, what: str, index: int) -> torch.Generator:
    """A CPU generator for parameter `what` number `index` of a layer."""
    digest = hashlib.sha256(f"{seed}/{layer}/{what}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
