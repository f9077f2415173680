"""Packing of small unsigned numbers into bytes, the first of a byte in its lowest bits.

Shapes: X any, L numbers, B bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional


def pack(code_XL: Tensor, bits: int) -> Tensor:
    """Pack numbers below 2^bits (uint8; bits: 1, 2, 4 or 8) into [X, B], with zeros after the last."""
    per_byte = 8 // bits
    code_XBP = functional.pad(code_XL, (0, -code_XL.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed_XB: Tensor = code_XBP[..., 0].clone()
    for place in range(1, per_byte):
        packed_XB |= code_XBP[..., place] << bits * place
    return packed_XB


def unpack(packed_XB: Tensor, length: int, bits: int) -> Tensor:
    """Unpack to [X, L], uint8."""
    places = range(0, 8, bits)
    code_XBP = torch.stack([packed_XB >> place & (1 << bits) - 1 for place in places], dim=-1)
    code_XL: Tensor = code_XBP.flatten(-2)[..., :length]
    return code_XL
