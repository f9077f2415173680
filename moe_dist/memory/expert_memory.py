"""Offload of a model's clusters during training: their tiers, the order of use, and prefetching.

Weights and gradients are loaded onto the device for use. On an accelerator, optimizer state stays on the host.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_dist.config import RunConfig
from moe_dist.errors import MoeDistError
from moe_dist.memory.block import Block, TensorKind
from moe_dist.memory.eviction import Activity
from moe_dist.memory.offloaded_cluster import OffloadedCluster
from moe_dist.memory.tiers import Tiers

Place = tuple[int, int]
"""Layer index, and index of a cluster among this rank's in that layer."""
GradientFunction = Callable[[OffloadedCluster, Tensor], None]


class ExpertMemory:
    """Storage of this rank's experts. It is passed to the model's constructor, so that they are never all in memory.

    Attributes:
        on_gradient: called with each cluster's complete gradient of a step.
        on_use: called with a cluster whose updates are deferred, before its blocks are used.
        refusal: reason why a cluster was rejected, without the text that Megatron-core adds while it builds a layer.
        last_pass: True during the step's last micro-batch.
    """

    def __init__(self, config: RunConfig, clusters_per_layer: int, rank: int, device: torch.device) -> None:
        """Create the tiers.

        Raises:
            OffloadError: the directory is used by another run, or cannot be created.
        """
        self._options, self._device = config.memory, device
        self._dtype: torch.dtype = getattr(torch, config.train.precision)
        self._per_layer = clusters_per_layer
        self.recomputes, self.recomputing = config.model.activation_checkpointing, False
        self.describe: Callable[[Block], str] = lambda b: f"layer {b.layer}, cluster index {b.local}"
        self.activity = Activity(config.moe_layers, clusters_per_layer)
        self.tiers = Tiers(config, rank, device, self.activity, lambda block: self.describe(block))
        self.device, self.state = self.tiers.device, self.tiers.below
        self.clusters: dict[Place, OffloadedCluster] = {}
        self._of_parameter: dict[nn.Parameter, tuple[OffloadedCluster, str]] = {}
        self.refusal: MoeDistError | None = None
        self.on_gradient: GradientFunction | None = None
        self.on_use: Callable[[OffloadedCluster], None] | None = None
        self.last_pass = False

    def adopt(self, layer: int, local: int, parameters: Mapping[str, nn.Parameter]) -> OffloadedCluster:
        """Take over the parameters of a new cluster; layers and clusters come in order.

        Raises:
            ConfigError: a budget is too small.
            OffloadError: the disk is full.
        """
        try:
            return self._adopt(layer, local, parameters)
        except MoeDistError as error:
            self.refusal = error
            raise

    def _adopt(self, layer: int, local: int, parameters: Mapping[str, nn.Parameter]) -> OffloadedCluster:
        cluster = OffloadedCluster(layer, local, parameters, self.device, self, self._dtype, self._device)
        self.tiers.require_room(layer, self.least_budget(cluster), self.least_host_budget(cluster))
        self.clusters[layer, local] = cluster
        self._of_parameter.update({parameter: (cluster, name) for name, parameter in parameters.items()})
        cluster.adopt(self.state)
        return cluster

    def least_budget(self, cluster: OffloadedCluster) -> int:
        """Return the device bytes that the largest working set needs: a backward pass, or an update."""
        sizes = {kind: size.bytes for kind, size in cluster.sizes().items()}
        at_once = self._per_layer if self.recomputes else 1
        backward = at_once * sizes[TensorKind.WEIGHT] + sizes[TensorKind.GRADIENT]
        return max(backward, sum(sizes.values())) if self.state is self.device else backward

    @staticmethod
    def least_host_budget(cluster: OffloadedCluster) -> int:
        """Return the host bytes that an update needs, beside a block in transit to or from the device."""
        sizes = [size.bytes for size in cluster.sizes().values()]
        return sum(sizes) + max(sizes)

    @property
    def separate_masters(self) -> bool:
        """True if FP32 master weights are blocks of their own, beside weights of a narrower type."""
        return self._dtype is not torch.float32

    def kind_of(self, name: str) -> TensorKind:
        """Return the kind of block that holds the optimizer's `name`; float32 weights are their own masters."""
        return TensorKind.WEIGHT if name == TensorKind.MASTER and not self.separate_masters else TensorKind(name)

    def of(self, parameter: nn.Parameter) -> tuple[OffloadedCluster, str] | None:
        """Return a parameter's cluster and its name there, or None if it is not offloaded."""
        return self._of_parameter.get(parameter)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all offloaded parameters."""
        return iter(self._of_parameter)

    def forward_begins(self, cluster: OffloadedCluster, rows: int) -> None:
        """Record a cluster's rows and prefetch the clusters that follow."""
        if torch.is_grad_enabled() and not self.recomputing:
            self.activity.note(cluster.layer, cluster.local, rows)
        following = (other for other in self.next_clusters(cluster, 1) if not other.behind)  # others rarely get tokens
        self.device.prefetch([other.block(TensorKind.WEIGHT) for other in following])

    def backward_begins(self, cluster: OffloadedCluster) -> None:
        """Prefetch the clusters that the backward pass needs next."""
        for other in self.next_clusters(cluster, -1):
            if other.expects_backward:
                self.device.prefetch([other.block(TensorKind.WEIGHT)])
                self.device.prefetch([other.block(TensorKind.GRADIENT)], zero_init=not other.has_gradient)

    def before_use(self, cluster: OffloadedCluster) -> None:
        """Make the cluster's deferred updates."""
        if cluster.behind:
            assert self.on_use is not None
            self.on_use(cluster)

    def gradient_is_complete(self, cluster: OffloadedCluster, gradient: Tensor) -> None:
        """Notify the optimizer after the last micro-batch."""
        if self.last_pass and self.on_gradient is not None:
            self.on_gradient(cluster, gradient)

    def next_clusters(self, cluster: OffloadedCluster, step: int) -> list[OffloadedCluster]:
        """Return the next `memory.prefetch` clusters in order of use, forward or backward."""
        index = cluster.layer * self._per_layer + cluster.local
        places = range(index + step, index + step * (self._options.prefetch + 1), step)
        found = (self.clusters.get(divmod(place, self._per_layer)) for place in places)
        return [other for other in found if other is not None]

    def read_run(self, cluster: OffloadedCluster, name: str, kind: TensorKind, start: int, length: int) -> Tensor:
        """Return a copy of a run of a parameter's flattened elements, read in the tier of the optimizer state."""
        with self.at_state(cluster, kind) as flat:
            first = cluster.layout.spans[name].start + start
            return flat[first : first + length].clone()

    def write_run(self, cluster: OffloadedCluster, name: str, kind: TensorKind, start: int, values: Tensor) -> None:
        """Overwrite a run of a parameter's flattened elements."""
        with self.at_state(cluster, kind, changed=True) as flat:
            first = cluster.layout.spans[name].start + start
            flat[first : first + len(values)].copy_(values)

    @contextmanager
    def at_state(self, cluster: OffloadedCluster, kind: TensorKind, *, changed: bool = False) -> Iterator[Tensor]:
        """Pin a cluster's block in the tier of the optimizer state, and return its elements."""
        self.before_use(cluster)
        block = cluster.block(kind)
        if self.state is not self.device and kind in (TensorKind.WEIGHT, TensorKind.GRADIENT):
            self.device.evict(block)
        with self.state.pinned(block, changed=changed) as flat:
            yield flat

    def close(self) -> None:
        """Release all tiers and their files."""
        self.tiers.close()
