"""Optimizer state by parameter: writable views of this rank's FP32 master weights and moments.

DeepSpeed has three layouts: whole tensors by parameter (ZeRO 0, float32), whole tensors in separate lists (ZeRO 0,
bfloat16), or this rank's part of a flat partition (ZeRO 1 and 2). This module has a single one for migration and
checkpoints: a *fragment*, a run of the flattened parameter's elements that this rank owns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from moe_dist.engine.muon import MUON_MOMENTS, MatrixMuon
from moe_dist.engine.offloaded_adamw import OffloadedAdamW
from moe_dist.engine.optimizer import MOMENTS
from moe_dist.engine.packed_adamw import PackedAdamW

MASTER = "master"
STATE_NAMES = (MASTER, *MOMENTS)
_STEP = "step"


@dataclass(frozen=True)
class StateFragment:
    """Run of one parameter's state, from element `start` of the flattened parameter."""

    start: int
    tensors: dict[str, Tensor]
    """Tensors by `OptimizerState.names_of`: one-dimensional float32 views of equal length; writes change the state."""

    @property
    def end(self) -> int:
        """Index after the last element."""
        return self.start + self.tensors[MASTER].numel()


class OptimizerState:
    """Optimizer state by parameter; before the first update the moments are zero and the step is 0."""

    def __init__(
        self,
        optimizer: Any,
        offloaded: OffloadedAdamW | None = None,
        packed: PackedAdamW | None = None,
        muon: MatrixMuon | None = None,
    ) -> None:
        """Create missing moments, and map parameters to their master weights.

        Args:
            optimizer: DeepSpeed's optimizer, of any ZeRO stage that moe-dist uses.
            offloaded: optimizer of offloaded experts.
            packed: optimizer of factors that are kept quantized.
            muon: optimizer of matrices.
        """
        self._optimizer, self.offloaded, self._packed, self._muon = optimizer, offloaded, packed, muon
        self._adamw: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        for managed in self._managed():
            _create_missing(self._adamw.state[managed], managed)
        self._masters = _whole_masters(optimizer)

    @torch.no_grad()
    def undo_trial_step(self) -> None:
        """Undo the step with zero gradients by which some of DeepSpeed's optimizers allocate their state.

        That step would count in the moments' bias correction and decay the weights (observed with ZeRO 0, bfloat16).
        """
        self.steps = 0
        for held, master in self._masters.items():
            master.copy_(held)

    def fragment(self, parameter: nn.Parameter) -> StateFragment | None:
        """Return this rank's fragment of a parameter's state.

        None: other replicas own it all (ZeRO 1 and 2), or the parameter is not trained. The masters of a quantized
        factor are a dequantized copy: `set_value` changes them.
        """
        if not parameter.requires_grad:
            return None
        if self._packed is not None and (found := self._packed.packed(parameter)) is not None:
            slots, moments = self._packed.owned(parameter)
            tensors = {MASTER: found[0].read(found[1], slots), **moments}
            start = slots.start * parameter[0].numel()
            flat = {name: tensor.view(-1) for name, tensor in tensors.items()}
            return StateFragment(start, flat) if slots.start < slots.stop else None
        if self._muon is not None and parameter in self._muon:
            owned = self._muon.owned(parameter)
            names = self.names_of(parameter)
            flat = {name: tensor.view(-1) for name, tensor in zip(names, owned or (), strict=owned is not None)}
            return StateFragment(0, flat) if flat else None
        if self.divided:
            return self._partitioned(parameter)
        master = self._masters.get(parameter, parameter)
        return self._fragment(0, master, 0, master.numel())

    def names_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Return the names of a parameter's tensors, of `STATE_NAMES`: Muon has one moment."""
        return (MASTER, *MUON_MOMENTS) if self._muon is not None and parameter in self._muon else STATE_NAMES

    def has_separate_master(self, parameter: nn.Parameter) -> bool:
        """Return True if a parameter's master weights are separate from it; a quantized factor has none."""
        if self._muon is not None and parameter in self._muon:
            return self._muon.has_separate_master()
        return self.separate_masters and not self.is_packed(parameter)

    def is_packed(self, parameter: nn.Parameter) -> bool:
        """Return True if a parameter is a placeholder of a quantized factor."""
        return self._packed is not None and self._packed.packed(parameter) is not None

    def value_of(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's value in its shape; of a quantized factor a copy, float32."""
        found = None if self._packed is None else self._packed.packed(parameter)
        return parameter.detach() if found is None else found[0].read(found[1])

    @torch.no_grad()
    def set_value(self, parameter: nn.Parameter, value: Tensor, first: int = 0) -> None:
        """Overwrite a parameter, without its master weights; a quantized factor is rounded to the nearest codes.

        Args:
            value: new value of entries of the first dimension.
            first: first of them.
        """
        found = None if self._packed is None else self._packed.packed(parameter)
        if found is None:
            parameter[first : first + len(value)].copy_(value)
        else:
            found[0].write(found[1], value, slice(first, first + len(value)))

    def bytes_of(self, parameter: nn.Parameter) -> int:
        """Return the bytes of a parameter's value on this rank, without its master weights."""
        found = None if self._packed is None else self._packed.packed(parameter)
        return parameter.numel() * parameter.element_size() if found is None else found[0].bytes_of(found[1])

    @property
    def divided(self) -> bool:
        """True if replicas own different parts of a parameter's state (ZeRO 1 and 2); False if each owns all of it."""
        return isinstance(self._optimizer, DeepSpeedZeroOptimizer)

    def _partitioned(self, parameter: Any) -> StateFragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        partition = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.get_hp_fragment_address()
        return self._fragment(mapping.lp_fragment_address.start, partition, address.start, address.numel)

    def _fragment(self, start: int, master: Tensor, offset: int, length: int) -> StateFragment:
        state = self._adamw.state[master]
        tensors = {MASTER: master.detach(), **{name: state[name] for name in MOMENTS}}
        return StateFragment(
            start, {name: tensor.view(-1)[offset : offset + length] for name, tensor in tensors.items()}
        )

    @property
    def separate_masters(self) -> bool:
        """True if master weights are separate from the parameters."""
        return isinstance(self._optimizer, DeepSpeedZeroOptimizer) or bool(self._masters)

    @property
    def separate_masters_of_experts(self) -> bool:
        """True if experts have separate master weights; offloaded ones do if their weights are not float32."""
        if self.offloaded is None:
            return self.separate_masters
        return self.offloaded.memory.separate_masters

    def is_offloaded(self, parameter: nn.Parameter) -> bool:
        """Return True if a parameter is offloaded; its state is then whole on each rank that holds it."""
        return self.offloaded is not None and self.offloaded.memory.of(parameter) is not None

    @property
    def steps(self) -> int:
        """Number of updates of the moments, for their bias correction."""
        return int(next(iter(self._step_counters())))

    @steps.setter
    def steps(self, value: int) -> None:
        for counter in self._step_counters():
            counter.fill_(value)
        for ours in (self.offloaded, self._packed):
            if ours is not None:
                ours.steps = value

    def _managed(self) -> Iterator[Tensor]:
        """Yield the tensors that AdamW itself updates."""
        for group in self._adamw.param_groups:
            yield from group["params"]

    def _step_counters(self) -> Iterator[Tensor]:
        return (self._adamw.state[managed][_STEP] for managed in self._managed())


def _create_missing(state: dict[str, Any], like: Tensor) -> None:
    """Create the state that torch's AdamW creates at its first step."""
    if not state:
        state[_STEP] = torch.zeros((), dtype=torch.float32, device=like.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)


def _whole_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Return the FP32 copy of each parameter if DeepSpeed keeps whole copies, else an empty mapping."""
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {held: master for held_ones, masters in groups for held, master in zip(held_ones, masters, strict=True)}
