"""AdamW for low-rank factors that are kept quantized (`precision.residuals=packed`).

An update dequantizes an expert's factor, steps it, and quantizes it with stochastic rounding: an update smaller than a
step of INT4 would be lost by rounding to nearest. The noise is a function of seed, layer, expert, factor and step.
DeepSpeed does not handle these parameters: gradients are summed over the replicas in float32, divided by the number of
ranks, included in the global norm and clipped by it. Under ZeRO each replica updates its part of the experts, for which
alone it has moments, and the codes are sent to the others.

Shapes: N experts of a cluster on this shard.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.compression.stochastic_rounding import noise_key
from moe_dist.config import RunConfig
from moe_dist.distributed.mesh import GroupKind
from moe_dist.engine.optimizer import MOMENTS, adamw_step, update_rule
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.packed_factors import PackedFactors
from moe_dist.moe.quantized_experts import storage_format


class Place(NamedTuple):
    """Layer and local cluster of a factor, and its name."""

    layer: ClusteredMoE
    local: int
    packed: PackedFactors
    name: str


class PackedAdamW:
    """Optimizer of all low-rank factors of a model; `steps` counts their updates."""

    def __init__(self, model: LanguageModel, config: RunConfig) -> None:
        """Quantize the model's factors, and take over their updates."""
        self._config, self._mesh = config, model.context.mesh
        self._replicas = self._mesh.group(GroupKind.EXPERT_DATA)
        self.divided = config.world.zero_stage > 0 and self._replicas.size > 1
        self.steps = 0
        self._places = {place.packed.parameters[place.name]: place for place in _pack(model, config)}
        self._moments = {parameter: self._zeros(parameter) for parameter in self._places}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the factors, which are placeholders."""
        return iter(self._places)

    def packed(self, parameter: nn.Parameter) -> tuple[PackedFactors, str] | None:
        """Return where the values of a factor are, and its name there; None: the parameter is not one."""
        place = self._places.get(parameter)
        return None if place is None else (place.packed, place.name)

    def owned(self, parameter: nn.Parameter) -> tuple[slice, dict[str, Tensor]]:
        """Return the slots that this rank updates, and their moments, in the shape of the parameter's part."""
        return self._slots(parameter), self._moments[parameter]

    def finish_gradients(self) -> Tensor:
        """Reduce the gradients of a step; return this rank's part of the squared norm, float64. Collective."""
        grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self._places]
        flat = torch.cat([grad.detach().float().flatten() for grad in grads])
        for parameter in self._places:
            parameter.grad = None
        if self._replicas.size > 1:
            dist.all_reduce(flat, group=self._replicas.handle)
        flat.div_(self._mesh.shape.stage_ranks)
        parts = flat.split([parameter.numel() for parameter in self._places])
        self._gradients = {p: part.view(p.shape) for p, part in zip(self._places, parts, strict=True)}
        square: Tensor = torch.linalg.vector_norm(flat, dtype=torch.float64).square().cpu()
        return square / self._replicas.size

    @torch.no_grad()
    def step(self, learning_rate: float, clip_factor: Tensor | None) -> None:
        """Update codes, scales and moments with the reduced gradients; collective under ZeRO."""
        for parameter, gradient in self._gradients.items():
            slots, _ = self.owned(parameter)
            if clip_factor is not None:
                gradient[slots].mul_(clip_factor.to(gradient.device))
            if slots.start < slots.stop:
                self._update(parameter, gradient[slots], learning_rate)
        self._gradients.clear()
        if self.divided:
            self._share_codes()
        self.steps += 1

    def discard_gradients(self) -> None:
        """Drop the gradients of a step that is skipped."""
        self._gradients.clear()

    def _update(self, parameter: nn.Parameter, gradient: Tensor, learning_rate: float) -> None:
        place, (slots, moments) = self._places[parameter], self.owned(parameter)
        rule = update_rule(f"residuals.{place.name}", parameter, self._config.optimizer)
        values = place.packed.read(place.name, slots)
        adamw_step(
            values,
            gradient.contiguous(),
            (moments["exp_avg"], moments["exp_avg_sq"]),
            self.steps,
            learning_rate,
            rule,
            self._config.optimizer,
        )
        keys = [
            noise_key(self._config.seed, place.layer.layer, expert, place.name, self.steps)
            for expert in self._experts(place)[slots]
        ]
        place.packed.write(place.name, values, slots, keys)

    def _experts(self, place: Place) -> tuple[int, ...]:
        placement, at = place.layer.placement, self._mesh.at
        return placement.experts_of(placement.clusters_of_block(at.cluster)[place.local], at.shard)

    def _share_codes(self) -> None:
        """Send the codes of every expert from the replica that updates it to all; exact, since others add zeros."""
        parts, kept = [], []
        for parameter, place in self._places.items():
            slots, factor = self._slots(parameter), place.packed.factors[place.name]
            for part in factor.parts().values():
                mine = torch.zeros_like(part)
                mine[slots] = part[slots]
                parts.append(part)
                kept.append(mine.view(torch.uint8).flatten())
        flat = torch.cat(kept)
        dist.all_reduce(flat, group=self._replicas.handle)
        for part, values in zip(parts, flat.split([part.nbytes for part in parts]), strict=True):
            part.copy_(values.view(part.dtype).view(part.shape))

    def _slots(self, parameter: nn.Parameter) -> slice:
        count, replicas = len(parameter), self._replicas.size if self.divided else 1
        index = self._mesh.index_in(GroupKind.EXPERT_DATA) if self.divided else 0
        return slice(count * index // replicas, count * (index + 1) // replicas)

    def _zeros(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        slots = self._slots(parameter)
        shape = (slots.stop - slots.start, *parameter.shape[1:])
        return {name: torch.zeros(shape, device=parameter.device) for name in MOMENTS}


def _pack(model: LanguageModel, config: RunConfig) -> Iterator[Place]:
    form, dtype = storage_format(config).factors, getattr(torch, config.train.precision)
    for layer in model.clustered_layers():
        for local, part in enumerate(layer.clusters):
            assert isinstance(part, ClusteredExperts)
            packed = part.residuals.pack(form, dtype)
            yield from (Place(layer, local, packed, name) for name in packed.parameters)
