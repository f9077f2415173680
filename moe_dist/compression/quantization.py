"""Group-wise quantization of factors: neighboring numbers share a scale, and a zero point unless symmetric.

Groups run along a factor's long axis, d or f, and never along its rank, which is smaller than a group: for U that is
the axis that `x U` contracts, for V its output axis. Each of the r components has groups and scales of its own. If the
group size does not divide the axis, the last group of a component is shorter.

    value = scale * (code - zero)        code, zero in 0 to 2^bits - 1; symmetric: zero = 2^(bits - 1)

Scales are rounded up to their storage type, so that nothing is clipped: every value is within half a scale of its
dequantized value. Quantization is torchao's, in float32.

Shapes: X the other axes, L the long axis (last here), G groups along it, S numbers of a group, B bytes, M = X G.
"""

import functools
import logging
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.compression.bit_packing import pack, unpack
from moe_dist.compression.stochastic_rounding import round_between, round_codes, uniform_noise


@dataclass(frozen=True)
class GroupFormat:
    """Format of group-wise quantized numbers."""

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def lowest(self) -> int:
        """Smallest signed code; the largest is `-lowest - 1`."""
        return -(1 << self.bits - 1)

    def groups(self, length: int) -> int:
        """Return the number of groups of a component."""
        return -(-length // self.group_size)


@dataclass(frozen=True)
class QuantizedFactor:
    """Quantized factor; immutable by convention. Parts have the long axis last, the others in their order."""

    format: GroupFormat
    shape: tuple[int, ...]
    axis: int
    """Long axis of `shape`: -1 or -2."""
    codes_XB: Tensor
    """Packed codes, uint8."""
    scales_XG: Tensor
    """Scales, of `format.scale_dtype`."""
    zeros_XB: Tensor | None
    """Zero points packed like the codes, uint8; None: symmetric."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, value: Tensor, axis: int, form: GroupFormat, keys: list[tuple[int, int]] | None = None
    ) -> "QuantizedFactor":
        """Quantize a factor of any floating-point type, on its device; on `meta` for the sizes alone.

        Args:
            keys: round stochastically (symmetric formats only), with a `noise_key` for each entry of the first
                dimension; None: round to nearest. Values dequantized from either are quantized to the same codes again.
        """
        value_XL = value.float().movedim(axis, -1)
        group_MS = _grouped(value_XL, form.group_size)
        if keys is None:
            codes_MS, scale_M, zero_M = _quantize(group_MS, form)
        else:
            codes_MS, scale_M, zero_M = _quantize_stochastically(group_MS, form, keys)
        groups = (*value_XL.shape[:-1], form.groups(value_XL.shape[-1]))
        codes_XL = codes_MS.view(*groups[:-1], -1)[..., : value_XL.shape[-1]]
        zeros_XB = None if form.symmetric else pack(zero_M.view(groups), form.bits)
        return cls(form, tuple(value.shape), axis, pack(codes_XL, form.bits), scale_M.view(groups), zeros_XB)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Dequantize, rounding once to `dtype`."""
        form, length = self.format, self.shape[self.axis]
        group_MS = _grouped(unpack(self.codes_XB, length, form.bits).char() + form.lowest, form.group_size)
        zero_M = torch.zeros_like(group_MS[:, 0])
        if self.zeros_XB is not None:
            zero_M = unpack(self.zeros_XB, form.groups(length), form.bits).flatten().char() + form.lowest
        value_MS = _torchao().dequantize_affine(
            group_MS, (1, group_MS.shape[1]), self.scales_XG.flatten().float(), zero_M, torch.int8, *_range(form)
        )
        value_XL = value_MS.view(*self.scales_XG.shape[:-1], -1)[..., :length]
        value: Tensor = value_XL.movedim(-1, self.axis).to(dtype).contiguous()
        return value

    def rows(self, rows: slice) -> "QuantizedFactor":
        """Return entries of the first dimension, as views."""
        parts = {name: part[rows] for name, part in self.parts().items()}
        shape = (len(parts["codes"]), *self.shape[1:])
        return replace(
            self, shape=shape, codes_XB=parts["codes"], scales_XG=parts["scales"], zeros_XB=parts.get("zeros")
        )

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors of the factor by the names under which they are stored."""
        parts = {"codes": self.codes_XB, "scales": self.scales_XG}
        return parts if self.zeros_XB is None else {**parts, "zeros": self.zeros_XB}

    def with_parts(self, parts: dict[str, Tensor]) -> "QuantizedFactor":
        """Return a copy with other codes, scales and zeros (the inverse of `parts`).

        Raises:
            ValueError: a part is missing, or has another type or shape.
        """
        for name, own in self.parts().items():
            found = parts.get(name)
            if found is None or (found.dtype, found.shape) != (own.dtype, own.shape):
                is_ = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise ValueError(f"{name}: {is_}, expected {own.dtype} {tuple(own.shape)}")
        return replace(self, codes_XB=parts["codes"], scales_XG=parts["scales"], zeros_XB=parts.get("zeros"))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts().values())


def _grouped(value_XL: Tensor, size: int) -> Tensor:
    """Reshape to [M, S]; zeros pad the last group, whose range includes 0 anyway."""
    padded_XL = functional.pad(value_XL, (0, -value_XL.shape[-1] % size))
    return padded_XL.reshape(-1, size).contiguous()  # torchao would keep the strides of a transposed view


def _quantize(group_MS: Tensor, form: GroupFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Compute codes [M, S], scales [M] in their storage type, and unsigned zero points [M]."""
    exact_M, zero_M = _exact_scale(group_MS, form)
    scale_M = _rounded_up(exact_M, form.scale_dtype)
    block = (1, group_MS.shape[1])
    code_MS = _torchao().quantize_affine(group_MS, block, scale_M.float(), zero_M, torch.int8, *_range(form))
    return (code_MS - form.lowest).byte(), scale_M, (zero_M - form.lowest).byte()


def _quantize_stochastically(
    group_MS: Tensor, form: GroupFormat, keys: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as `_quantize`; codes and scales are rounded up or down at random, without bias.

    Scales too: always rounded up, the outermost number of a group would grow with each of many updates.
    """
    count, size = group_MS.shape
    noise = uniform_noise(keys, count // len(keys) * (size + 1), group_MS.device).view(count, size + 1)
    exact_M, zero_M = _exact_scale(group_MS, form)
    above_M = _rounded_up(exact_M, form.scale_dtype)
    below_M = torch.where(above_M.float() > exact_M, (above_M.view(torch.int16) - 1).view(form.scale_dtype), above_M)
    scale_M = round_between(exact_M, below_M, above_M, noise[:, -1])
    code_MS = round_codes(group_MS / scale_M.float()[:, None], form.lowest, noise[:, :-1])
    return (code_MS - form.lowest).byte(), scale_M, (zero_M - form.lowest).byte()


def _exact_scale(group_MS: Tensor, form: GroupFormat) -> tuple[Tensor, Tensor]:
    """Compute scales, float32 [M], with which nothing is clipped, and zero points, int8 [M]."""
    torchao = _torchao()
    mapping = torchao.MappingType.SYMMETRIC_NO_CLIPPING_ERR if form.symmetric else torchao.MappingType.ASYMMETRIC
    least = torch.finfo(form.scale_dtype).smallest_normal
    exact_M, zero_M = torchao.choose_qparams_affine(
        group_MS,
        mapping,
        (1, group_MS.shape[1]),
        torch.int8,
        *_range(form),
        eps=least,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int8,
    )
    return exact_M, zero_M


def _rounded_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round up to the next number of a type, or to its largest finite one."""
    nearest = value.clamp(max=torch.finfo(dtype).max).to(dtype)
    above = (nearest.view(torch.int16) + 1).view(dtype)  # the next bit pattern of a positive number
    found: Tensor = torch.where(nearest.float() < value, above, nearest)
    return torch.where(found.isinf(), nearest, found)


def _range(form: GroupFormat) -> tuple[int, int]:
    return form.lowest, -form.lowest - 1


@functools.cache
def _torchao() -> Any:
    """Import torchao's primitives at the first use: it takes seconds, and logs the extensions that it lacks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao.quantization import quant_primitives
    finally:
        logging.disable(before)
    module: ModuleType = quant_primitives
    return module
