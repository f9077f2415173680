"""Quantized weights of a cluster: the base in 16 bits, factors in 4 or 8, vectors unchanged.

Exported files and memory tiers hold clusters in this form. `fake_quantize` gives training the same numbers, to the bit.

Shapes: N experts of the cluster, D model width, F hidden width, H = 2 F (gate | up), B bytes of an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.compression.quantization import GroupFormat, QuantizedFactor
from moe_dist.compression.straight_through import straight_through

_LONG_AXIS = {"in_u": -2, "in_v": -1, "out_u": -2, "out_v": -1}


def long_axis(name: str) -> int | None:
    """Return a factor's axis that is d or f, by its name (`in_u_NDR`, `in_u_DR` of one expert); None: no factor."""
    return _LONG_AXIS.get(name.rpartition("_")[0])


@dataclass(frozen=True)
class StorageFormat:
    """Storage types of a cluster."""

    factors: GroupFormat
    bases: torch.dtype


@dataclass(frozen=True)
class QuantizedExperts:
    """Quantized tensors of experts, by their names in `ClusterWeights`."""

    factors: Mapping[str, QuantizedFactor]
    vectors: Mapping[str, Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], form: GroupFormat) -> "QuantizedExperts":
        """Quantize the factors among the tensors; on `meta` for sizes alone."""
        factors = {
            name: QuantizedFactor.of(tensor, axis, form)
            for name, tensor in tensors.items()
            if (axis := long_axis(name)) is not None
        }
        return cls(factors, {name: tensor.detach() for name, tensor in tensors.items() if name not in factors})

    def unpacked(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all tensors, each rounded once to `dtype`."""
        factors = {name: factor.unpacked(dtype) for name, factor in self.factors.items()}
        return factors | {name: vector.to(dtype) for name, vector in self.vectors.items()}

    def parts(self) -> dict[str, Tensor]:
        """Return all stored tensors, by names such as `in_u_NDR.codes`; the first dimension is the expert."""
        packed = {
            f"{name}.{part}": tensor for name, factor in self.factors.items() for part, tensor in factor.parts().items()
        }
        return {**packed, **self.vectors}

    def with_parts(self, parts: Mapping[str, Tensor]) -> "QuantizedExperts":
        """Return experts of the same format with other values."""
        factors = {
            name: factor.with_parts({part: parts[f"{name}.{part}"] for part in factor.parts()})
            for name, factor in self.factors.items()
        }
        return QuantizedExperts(factors, {name: parts[name] for name in self.vectors})

    def without_values(self) -> "QuantizedExperts":
        """Return the same shapes on `meta`."""
        return self.with_parts({name: part.to("meta") for name, part in self.parts().items()})

    def to_bytes(self) -> Tensor:
        """Serialize to uint8 [N, B], one row per expert, so that experts can be sent one by one."""
        rows = [part.contiguous().flatten(1).view(torch.uint8) for part in self.parts().values()]
        return torch.cat(rows, dim=1)

    def with_bytes(self, rows_NB: Tensor) -> "QuantizedExperts":
        """Deserialize experts of the same format and number.

        Raises:
            ValueError: wrong number of bytes or experts.
        """
        parts = self.parts()
        experts = len(next(iter(parts.values())))
        sizes = [part.nbytes // experts for part in parts.values()]
        if rows_NB.dtype != torch.uint8 or rows_NB.shape != (experts, sum(sizes)):
            found = f"{rows_NB.dtype} {tuple(rows_NB.shape)}"
            raise ValueError(f"{experts} packed experts are torch.uint8 {(experts, sum(sizes))}, not {found}")
        values = {}
        for (name, part), row_NB in zip(parts.items(), rows_NB.split(sizes, dim=1), strict=True):
            own_NB = row_NB.clone(memory_format=torch.contiguous_format)  # views of other types need aligned storage
            values[name] = own_NB.view(part.dtype).view(part.shape)
        return self.with_parts(values)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(part.nbytes for part in self.parts().values())


@dataclass(frozen=True)
class QuantizedCluster:
    """Quantized base and experts of one cluster, or of a rank's part of it."""

    base_in_DH: Tensor
    base_out_FD: Tensor
    experts: QuantizedExperts

    @classmethod
    @torch.no_grad()
    def of(cls, weights: ClusterWeights, form: StorageFormat) -> "QuantizedCluster":
        """Round the base and quantize the experts; on `meta` for sizes alone."""
        base_in_DH, base_out_FD = (base.detach().to(form.bases) for base in (weights.base_in_DH, weights.base_out_FD))
        return cls(base_in_DH, base_out_FD, QuantizedExperts.of(_own(weights), form.factors))

    def weights(self, dtype: torch.dtype) -> ClusterWeights:
        """Return dequantized weights."""
        return ClusterWeights(self.base_in_DH.to(dtype), self.base_out_FD.to(dtype), **self.experts.unpacked(dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of base and experts."""
        return self.base_in_DH.nbytes + self.base_out_FD.nbytes + self.experts.nbytes


def fake_quantize(weights: ClusterWeights, form: StorageFormat) -> ClusterWeights:
    """Quantize and dequantize the weights, with straight-through gradients.

    Nothing is clipped, so every number has a gradient.
    """

    def base(value: Tensor) -> Tensor:
        return value.to(form.bases).to(value.dtype)

    def factor(value: Tensor, axis: int) -> Tensor:
        return QuantizedFactor.of(value, axis, form.factors).unpacked(value.dtype)

    changed = {
        name: straight_through(value, lambda value, axis=axis: factor(value, axis))  # type: ignore[misc]
        for name, value in _own(weights).items()
        if (axis := long_axis(name)) is not None
    }
    for name in ("base_in_DH", "base_out_FD"):
        changed[name] = straight_through(getattr(weights, name), base)
    return replace(weights, **changed)


def _own(weights: ClusterWeights) -> dict[str, Tensor]:
    """Return the tensors whose first dimension is the expert."""
    return {name: value for name, value in vars(weights).items() if value is not None and not name.startswith("base_")}
