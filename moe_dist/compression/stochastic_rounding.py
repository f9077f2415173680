"""Stochastic rounding, with noise that is a function of a key and an index: the same on any device and any layout.

Shapes: N keys, M groups, S numbers of a group.
"""

import hashlib

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def noise_key(*parts: object) -> tuple[int, int]:
    """Return two 32-bit words that identify a stream of noise, such as one expert's factor at one step."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def uniform_noise(keys: list[tuple[int, int]], length: int, device: torch.device) -> Tensor:
    """Return numbers in [0, 1) in multiples of 2^-24, float32 [N, length]: a hash of each key and index."""
    first_N1, second_N1 = torch.tensor(keys, device=device).unsqueeze(-1).unbind(1)
    index_L = torch.arange(length, device=device)
    return (_mix(_mix(index_L ^ first_N1) ^ second_N1) >> 8).float() * 2.0**-24


def _mix(word: Tensor) -> Tensor:
    """Return the 32-bit finalizer of MurmurHash3 of words held in int64."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ word >> shift) * factor & _WORD
    return word ^ word >> 16


def round_between(value: Tensor, below: Tensor, above: Tensor, noise: Tensor) -> Tensor:
    """Round each value to one of its two neighbors, without bias: the nearer one is the likelier."""
    gap = (above.float() - below.float()).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(noise < (value - below.float()) / gap, above, below)


def round_codes(exact_MS: Tensor, lowest: int, noise_MS: Tensor) -> Tensor:
    """Round numbers in units of their group's scale to signed codes, int8.

    The number that determines its group's scale gets the outermost code, so that quantizing the dequantized values
    again finds the same scale and the same codes.

    Args:
        exact_MS: numbers, of which the outermost of a group is about `lowest` or `-lowest - 1`.
        lowest: smallest code; the largest is `-lowest - 1`.
    """
    highest = -lowest - 1
    reach_MS = torch.maximum(exact_MS / highest, exact_MS / lowest)
    largest_M1 = reach_MS.amax(1, keepdim=True)  # about 1; less where the scale is the least of its type
    outermost_MS = (reach_MS == largest_M1) & (reach_MS > 0.9)
    end_MS = torch.where(exact_MS > 0, highest, lowest).to(exact_MS.dtype)
    code_MS = torch.where(outermost_MS, end_MS, (exact_MS + noise_MS).floor())
    return code_MS.clamp(lowest, highest).to(torch.int8)
