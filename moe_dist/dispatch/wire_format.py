"""Wire formats of hidden vectors: a cast to a shorter type, or eight bits a number with one scale for each vector.

Int8: q = round(127 x / max|x|) of each vector. Its scale max|x| / 127 (float32) follows in the same row, so that there
is one message as before and D + 4 bytes a vector. The gradient passes the rounding unchanged (straight-through) and is
rounded in the same way on its own exchange. A vector that is not finite becomes NaN.

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
        """Return the rows as they are sent, [R, B]."""

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows [R, D] in `dtype`."""


class IdentityFormat:
    """Rows in their own type."""

    def pack(self, x_RD: Tensor) -> Tensor:
        """Return the rows unchanged."""
        return x_RD

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows unchanged."""
        return packed_RB


IDENTITY_FORMAT = IdentityFormat()


@dataclass(frozen=True)
class CastFormat:
    """Numbers of a type that may be shorter."""

    dtype: torch.dtype

    def pack(self, x_RD: Tensor) -> Tensor:
        """Cast the rows to the wire's type."""
        return x_RD.to(self.dtype)

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast the rows back."""
        return packed_RB.to(dtype)


class Int8Format:
    """Eight bits a number, and one scale a vector."""

    def pack(self, x_RD: Tensor) -> Tensor:
        """Return codes and the scale of each row as bytes."""
        return pack(x_RD)

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers that codes and scales stand for."""
        return unpack(packed_RB, dtype)


def wire_format_of(wire_dtype: torch.dtype) -> WireFormat:
    """Return the format for `moe.wire_dtype`."""
    return Int8Format() if wire_dtype is torch.int8 else CastFormat(wire_dtype)


def pack(x_RD: Tensor) -> Tensor:
    """Quantize vectors to rows of bytes, int8 [R, D + 4]."""
    wide_RD = x_RD.detach().to(_SCALE)
    scale_R1 = wide_RD.abs().amax(dim=1, keepdim=True) / _STEPS
    scale_R1 = torch.where(scale_R1.isinf(), torch.nan, scale_R1)
    steps_RD = (wide_RD / scale_R1).nan_to_num(0).round().to(torch.int8)  # 0 / 0 of a vector of zeros
    return torch.cat([steps_RD, scale_R1.view(torch.int8)], dim=1)


def unpack(packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the vectors [R, D] that `pack` quantized."""
    steps_RD, scale_R4 = packed_RB.split([packed_RB.shape[1] - _SCALE.itemsize, _SCALE.itemsize], dim=1)
    x_RD: Tensor = steps_RD * scale_R4.clone(memory_format=torch.contiguous_format).view(_SCALE)
    return x_RD.to(dtype)
