"""Gathered optimizer state: masters and moments of whole parameters, from and to the fragments that ranks own.

Shapes: P elements of a flattened parameter, S the three `STATE_NAMES`; a moment that does not exist is zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.optimizer_state import MASTER, STATE_NAMES, OptimizerState, StateFragment
from moe_dist.memory.block import TensorKind
from moe_dist.moe.parameter_class import REDUCED_OVER, class_of, copies_of

GatheredOptimizerState = dict[str, Tensor]
"""Tensors by `STATE_NAMES`: float32, each in the parameter's shape."""


@dataclass(frozen=True)
class OwnedState:
    """Part of a parameter's optimizer state that this rank owns; a `copy` stays valid without the optimizer."""

    shape: torch.Size
    fragment: StateFragment | None
    group: dist.ProcessGroup | None
    """Ranks that hold the parameter; None: all."""
    divided: bool
    """True if each of these ranks owns a different part of the state; False if each owns all of it."""

    @classmethod
    def of(cls, state: OptimizerState, parameter: nn.Parameter, mesh: Mesh) -> "OwnedState":
        """Return views of the optimizer's tensors for one parameter."""
        kind = REDUCED_OVER.get(class_of(parameter))
        group = mesh.stage_group if kind is None else mesh.group(kind).handle
        divided = state.divided and copies_of(parameter, mesh) > 1
        return cls(parameter.shape, state.fragment(parameter), group, divided)

    def copy(self) -> "OwnedState":
        """Return a deep copy."""
        if self.fragment is None:
            return self
        tensors = {name: tensor.clone() for name, tensor in self.fragment.tensors.items()}
        return OwnedState(self.shape, StateFragment(self.fragment.start, tensors), self.group, self.divided)

    @torch.no_grad()
    def whole(self, device: torch.device) -> GatheredOptimizerState:
        """Gather the whole state on every rank that holds the parameter; collective over them if it is divided."""
        whole_SP = torch.zeros(len(STATE_NAMES), self.shape.numel(), device=device)
        if self.fragment is not None:
            for row_P, name in zip(whole_SP, STATE_NAMES, strict=True):
                if name in self.fragment.tensors:
                    row_P[self.fragment.start : self.fragment.end] = self.fragment.tensors[name]
        if self.divided:
            dist.all_reduce(whole_SP, group=self.group)  # exact: every element is zero on all ranks but one
        return {name: row_P.view(self.shape) for row_P, name in zip(whole_SP, STATE_NAMES, strict=True)}


def read_offloaded(state: OptimizerState, parameter: nn.Parameter) -> Tensor:
    """Return the master weights of an offloaded parameter, in its shape."""
    assert state.offloaded is not None
    memory, found = state.offloaded.memory, state.offloaded.memory.of(parameter)
    assert found is not None
    return memory.read_run(*found, memory.kind_of(MASTER), 0, parameter.numel()).view(parameter.shape)


@torch.no_grad()
def write_whole(state: OptimizerState, parameter: nn.Parameter, whole: Mapping[str, Tensor]) -> None:
    """Write a parameter's value, and this rank's fragment of its master weights and of the moments in `whole`."""
    if state.offloaded is not None and (found := state.offloaded.memory.of(parameter)) is not None:
        memory, (cluster, name) = state.offloaded.memory, found
        blocks = {TensorKind.WEIGHT: whole[MASTER], **{memory.kind_of(kind): value for kind, value in whole.items()}}
        for kind, value in blocks.items():
            memory.write_run(cluster, name, kind, 0, value.flatten())
        return
    state.set_value(parameter, whole[MASTER])
    fragment = state.fragment(parameter)
    if fragment is not None:
        for name, tensor in fragment.tensors.items():
            if name in whole:
                tensor.copy_(whole[name].flatten()[fragment.start : fragment.end])


@torch.no_grad()
def restore(state: OptimizerState, parameter: nn.Parameter, value: Tensor, owned: OwnedState) -> None:
    """Restore a parameter to its earlier `value_of`, and this rank's fragment of its state to an earlier copy."""
    state.set_value(parameter, value)
    fragment = state.fragment(parameter)
    if fragment is not None and owned.fragment is not None:
        for name, kept in owned.fragment.tensors.items():
            fragment.tensors[name].copy_(kept)
