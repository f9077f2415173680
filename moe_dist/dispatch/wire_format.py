"""How hidden vectors travel between ranks: rounded to a shorter type, or as eight bits a number with a scale a vector.

Eight bits: q = round(127 x / max|x|) of each vector, which travels with its scale max|x| / 127 (float32) behind it in
the same row, so that there is one message as before and D + 4 bytes a vector. The gradient passes the rounding as it is
(straight-through) and is rounded alike on its own way. A vector that is not finite arrives as NaN.

Shapes: R rows, D hidden, B = D + 4 bytes of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.dispatch.all_to_all import AllToAll, PendingRows, WireFormat
from moe_dist.dispatch.traffic_ledger import Payload

_STEPS = 127
_SCALE = torch.float32


def depart(
    channel: AllToAll, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], wire_dtype: torch.dtype
) -> PendingRows:
    """Sends hidden vectors as `wire_dtype`; where nobody else is in the group they stay as they are."""
    return channel.depart(x_RD, send, receive, Payload.HIDDEN, wire_format_of(wire_dtype))


def travel(
    channel: AllToAll, x_RD: Tensor, send: Sequence[int], receive: Sequence[int], wire_dtype: torch.dtype
) -> Tensor:
    """Departs, and waits for the arrival."""
    return depart(channel, x_RD, send, receive, wire_dtype).arrive()


@dataclass(frozen=True)
class CastFormat:
    """Numbers of a type that may be shorter."""

    dtype: torch.dtype

    def pack(self, x_RD: Tensor) -> Tensor:
        """Rows in the type of the wire."""
        return x_RD.to(self.dtype)

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows in the type that they are computed in."""
        return packed_RB.to(dtype)


class Int8Format:
    """Eight bits a number, and a scale."""

    def pack(self, x_RD: Tensor) -> Tensor:
        """Codes and the scale of each row, as bytes."""
        return pack(x_RD)

    def unpack(self, packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers that codes and scales stand for."""
        return unpack(packed_RB, dtype)


def wire_format_of(wire_dtype: torch.dtype) -> WireFormat:
    """What hidden vectors travel as."""
    return Int8Format() if wire_dtype is torch.int8 else CastFormat(wire_dtype)


def pack(x_RD: Tensor) -> Tensor:
    """Vectors as rows of bytes, int8 [R, D + 4]."""
    wide_RD = x_RD.detach().to(_SCALE)
    scale_R1 = wide_RD.abs().amax(dim=1, keepdim=True) / _STEPS
    scale_R1 = torch.where(scale_R1.isinf(), torch.nan, scale_R1)
    steps_RD = (wide_RD / scale_R1).nan_to_num(0).round().to(torch.int8)  # 0 / 0 of a vector of zeros
    return torch.cat([steps_RD, scale_R1.view(torch.int8)], dim=1)


def unpack(packed_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors that `pack` rounded, [R, D]."""
    steps_RD, scale_R4 = packed_RB.split([packed_RB.shape[1] - _SCALE.itemsize, _SCALE.itemsize], dim=1)
    x_RD: Tensor = steps_RD * scale_R4.clone(memory_format=torch.contiguous_format).view(_SCALE)
    return x_RD.to(dtype)
