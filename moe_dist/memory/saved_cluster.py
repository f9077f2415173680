"""Copy of an offloaded cluster's weights and optimizer state, to read while the cluster is rewritten, or to restore.

The copy is in blocks of its own on the tier of the optimizer state, so that it is evicted like any other block.
"""

import torch
from torch import Tensor

from moe_dist.memory.block import Block, TensorKind
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.memory.offloaded_cluster import OffloadedCluster


class SavedCluster:
    """Copy of one cluster; two blocks of one kind are in memory at a time."""

    def __init__(self, memory: ExpertMemory, cluster: OffloadedCluster) -> None:
        """Copy the cluster as it is now."""
        self._memory, self._cluster = memory, cluster
        self._kinds = [kind for kind in cluster.sizes() if kind is not TensorKind.GRADIENT]
        for kind in self._kinds:
            memory.state.register(self._copy(kind), cluster.sizes()[kind])
            with (
                memory.at_state(cluster, kind) as values,
                memory.state.pinned(self._copy(kind), changed=True, idle=True, zero_init=True) as copy,
            ):
                copy.copy_(values)

    def read(self, name: str, kind: TensorKind) -> Tensor:
        """Return a copy of a parameter's saved values, in its shape."""
        with self._memory.state.pinned(self._copy(kind)) as copy:
            return self._cluster.layout.views(copy)[name].clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Write the saved values back, and forget them."""
        for kind in self._kinds:
            with (
                self._memory.state.pinned(self._copy(kind), idle=True) as copy,
                self._memory.at_state(self._cluster, kind, changed=True) as values,
            ):
                values.copy_(copy)
        self.drop()

    def drop(self) -> None:
        """Forget the saved values."""
        for kind in self._kinds:
            self._memory.state.drop(self._copy(kind))

    def _copy(self, kind: TensorKind) -> Block:
        return self._cluster.block(kind)._replace(saved=True)
