"""What the optimizer knows of each parameter on this rank: FP32 master weights and Adam moments, free to be written.

DeepSpeed keeps them in three forms: whole beside each parameter (ZeRO 0, float32), whole in lists of their own (ZeRO 0,
bfloat16), or as this rank's piece of a flat partition (ZeRO 1 and 2). Whoever moves or saves the state of an expert
sees one form here: a *fragment*, a run of the flattened parameter's elements that this rank owns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from moe_dist.engine.offloaded_adamw import OffloadedAdamW

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_NAMES = (MASTER, *MOMENTS)
_STEP = "step"


@dataclass(frozen=True)
class StateFragment:
    """A run of one parameter's state, from element `start` of the flattened parameter."""

    start: int
    tensors: dict[str, Tensor]
    """By `STATE_NAMES`: one-dimensional float32 views of equal length; writing to them changes the state."""

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.start + self.tensors[MASTER].numel()


class OptimizerState:
    """The optimizer's state, parameter by parameter. Values before the first update are zero moments, step 0."""

    def __init__(self, optimizer: Any, offloaded: OffloadedAdamW | None = None) -> None:
        """
        Args:
            optimizer: `DeepSpeedEngine.optimizer`, of any ZeRO stage that moe-dist uses.
            offloaded: the optimizer of experts that are kept in tiers.
        """
        self._optimizer, self.offloaded = optimizer, offloaded
        self._adamw: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        for managed in self._managed():
            _create_missing(self._adamw.state[managed], managed)
        self._masters = _whole_masters(optimizer)

    @torch.no_grad()
    def undo_trial_step(self) -> None:
        """Back to before DeepSpeed's first step: one with zero gradients, by which some of its optimizers make room.

        It counts in the moments' correction and decays the weights (seen with ZeRO 0 in bfloat16).
        """
        self.steps = 0
        for held, master in self._masters.items():
            master.copy_(held)

    def fragment(self, parameter: nn.Parameter) -> StateFragment | None:
        """What this rank owns of a parameter's state; None where other replicas own all of it (ZeRO 1 and 2)."""
        if self.divided:
            return self._partitioned(parameter)
        master = self._masters.get(parameter, parameter)
        return self._fragment(0, master, 0, master.numel())

    @property
    def divided(self) -> bool:
        """Whether replicas of a parameter own different parts of its state (ZeRO 1 and 2), or each all of it."""
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
        """Whether masters are tensors of their own, beside the weights."""
        return isinstance(self._optimizer, DeepSpeedZeroOptimizer) or bool(self._masters)

    @property
    def separate_masters_of_experts(self) -> bool:
        """The same for experts, which in tiers have masters of their own only where weights are narrower."""
        if self.offloaded is None:
            return self.separate_masters
        return self.offloaded.memory.separate_masters

    def is_offloaded(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter's values and state are in tiers, whole on each rank that holds it."""
        return self.offloaded is not None and self.offloaded.memory.of(parameter) is not None

    @property
    def steps(self) -> int:
        """Updates that the moments have seen, which corrects their start from zero."""
        return int(next(iter(self._step_counters())))

    @steps.setter
    def steps(self, value: int) -> None:
        for counter in self._step_counters():
            counter.fill_(value)
        if self.offloaded is not None:
            self.offloaded.steps = value

    def _managed(self) -> Iterator[Tensor]:
        """The tensors that AdamW itself updates."""
        for group in self._adamw.param_groups:
            yield from group["params"]

    def _step_counters(self) -> Iterator[Tensor]:
        return (self._adamw.state[managed][_STEP] for managed in self._managed())


def _create_missing(state: dict[str, Any], like: Tensor) -> None:
    """As torch's AdamW does at its first step."""
    if not state:
        state[_STEP] = torch.zeros((), dtype=torch.float32, device=like.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)


def _whole_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """The FP32 copy of each parameter where DeepSpeed keeps whole ones."""
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {held: master for held_ones, masters in groups for held, master in zip(held_ones, masters, strict=True)}
