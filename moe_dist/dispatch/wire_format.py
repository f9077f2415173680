"""Wire formats of hidden vectors: a cast to a shorter dtype, or int8 codes with one scale per vector.

Int8: q = round(127 x / max|x|) of each vector. The scale max|x| / 127 (float32) is appended to the row, so that the
number of messages stays the same and a vector takes D + 4 bytes. The gradient ignores the rounding (straight-through
estimator) and is quantized in the same way when it is exchanged. A vector that is not finite becomes NaN.

Shapes: R rows, D hidden, B = D + 4 bytes of a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_STEPS = 127
_SCALE = torch.float32


class WireFormat(Protocol):
    """Encoding of rows, and of their gradients, during an all-to-all."""

    def pack(self, x_RD: Tensor) -> Tensor:
        """Encode the rows for the wire, [R, B]."""

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode the rows [R, D] to `dtype`."""


class IdentityFormat:
    """Rows in their own dtype."""

    def pack(self, x_RD: Tensor) -> Tensor:
        """Return the rows unchanged."""
        return x_RD

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows unchanged."""
        return packed_RB


IDENTITY_FORMAT = IdentityFormat()


@dataclass(frozen=True)
class CastFormat:
    """Rows cast to another dtype, usually a shorter one."""

    dtype: torch.dtype

    def pack(self, x_RD: Tensor) -> Tensor:
        """Cast the rows to the wire's dtype."""
        return x_RD.to(self.dtype)

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast the rows back."""
        return packed_RB.to(dtype)


class Int8Format:
    """Rows quantized to 8 bits, with one scale per row."""

    def pack(self, x_RD: Tensor) -> Tensor:
        """Quantize the rows (`pack`)."""
        return pack(x_RD)

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantize the rows (`unpack`)."""
        return unpack(packed_RB, dtype)


def wire_format_of(wire_dtype: torch.dtype) -> WireFormat:
    """Return the format for `moe.wire_dtype`."""
    return Int8Format() if wire_dtype is torch.int8 else CastFormat(wire_dtype)


def pack(x_RD: Tensor) -> Tensor:
    """Quantize vectors; return codes and scale of each as a row of bytes, int8 [R, D + 4]."""
    wide_RD = x_RD.detach().to(_SCALE)
    scale_R1 = wide_RD.abs().amax(dim=1, keepdim=True) / _STEPS
    scale_R1 = torch.where(scale_R1.isinf(), torch.nan, scale_R1)
    steps_RD = (wide_RD / scale_R1).nan_to_num(0).round().to(torch.int8)  # 0 / 0 for a vector of zeros
    return torch.cat([steps_RD, scale_R1.view(torch.int8)], dim=1)


def unpack(packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize rows of `pack` to vectors [R, D]."""
    steps_RD, scale_R4 = packed_RB.split([packed_RB.shape[1] - _SCALE.itemsize, _SCALE.itemsize], dim=1)
    x_RD: Tensor = steps_RD * scale_R4.clone(memory_format=torch.contiguous_format).view(_SCALE)
    return x_RD.to(dtype)
