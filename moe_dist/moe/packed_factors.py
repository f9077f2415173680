"""Low-rank factors under training that are kept as codes and scales, without float32 masters.

The parameters themselves are placeholders, one NaN expanded to their shapes; autograd brings them their gradients.

Shapes: N experts of a cluster on this shard.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_dist.compression import GroupFormat, QuantizedFactor, long_axis
from moe_dist.compression.straight_through import straight_through

ALL = slice(None)


class PackedFactors:
    """Quantized factors of one cluster's experts."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], form: GroupFormat, dtype: torch.dtype) -> None:
        """Quantize the factors among the parameters, to the nearest codes, and leave placeholders.

        Args:
            parameters: parameters of experts by their names in `ClusterWeights`; the first dimension is the expert.
            dtype: type of the computation.
        """
        self.parameters = {name: one for name, one in parameters.items() if long_axis(name) is not None}
        self.factors = {name: self._quantize(name, one.detach(), form) for name, one in self.parameters.items()}
        for parameter in self.parameters.values():
            nothing = torch.full((1,), float("nan"), dtype=dtype, device=parameter.device)
            parameter.data = nothing.expand(parameter.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the values of the forward pass by name; their gradients reach the parameters."""
        return {
            name: straight_through(parameter, lambda empty, name=name: self.factors[name].unpacked(empty.dtype))  # type: ignore[misc]
            for name, parameter in self.parameters.items()
        }

    def read(self, name: str, slots: slice = ALL) -> Tensor:
        """Return the values of some experts, float32."""
        return self.factors[name].rows(slots).unpacked(torch.float32)

    @torch.no_grad()
    def write(self, name: str, values: Tensor, slots: slice = ALL, keys: list[tuple[int, int]] | None = None) -> None:
        """Quantize and store the values of some experts; `keys` as for `QuantizedFactor.of`."""
        packed = self._quantize(name, values, self.factors[name].format, keys)
        for part, stored in self.factors[name].rows(slots).parts().items():
            stored.copy_(packed.parts()[part])

    def bytes_of(self, name: str) -> int:
        """Return the stored bytes of a factor."""
        return self.factors[name].nbytes

    @staticmethod
    def _quantize(
        name: str, values: Tensor, form: GroupFormat, keys: list[tuple[int, int]] | None = None
    ) -> QuantizedFactor:
        axis = long_axis(name)
        assert axis is not None
        return QuantizedFactor.of(values, axis, form, keys)
