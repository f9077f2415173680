"""AdamW for offloaded experts, cluster by cluster, on the memory tier of their training state.

DeepSpeed does not handle these parameters. Their update has the same steps in the same order and with the same
arithmetic as DeepSpeed's: gradients are summed over the replicas, divided by the number of ranks, included in the
global norm and clipped by it, and torch's fused AdamW updates the weights. In float32 on a CPU the result is
bit-identical. DeepSpeed's CPU Adam is not used, because it rounds differently from the optimizer of the other
parameters.

A cluster without tokens on any of its replicas has a zero gradient, but AdamW still decays its weights and moments.
With `memory.lazy_updates` such updates are *deferred*, and made one by one, with the learning rate and step of each, by
the same kernel, before the cluster's blocks are used again.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.config import OptimizerConfig
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.optimizer import UpdateRule, adamw_step, update_rule
from moe_dist.memory.block import TensorKind
from moe_dist.memory.expert_memory import ExpertMemory, Place
from moe_dist.memory.offloaded_cluster import OffloadedCluster
from moe_dist.moe.parameter_class import REDUCED_OVER, ParameterClass, class_of, copies_of

Blocks = dict[TensorKind, Tensor]

CHUNK = 2**15
"""Elements to which deferred updates are applied at a time, so that they stay in a core's cache: 512 KiB."""


class OffloadedAdamW:
    """Optimizer of all clusters in an `ExpertMemory`.

    Attributes:
        updates, deferred: numbers of updates of clusters since the start, and of those of them that were deferred.
        longest: largest number of updates that were deferred in succession.
    """

    def __init__(self, memory: ExpertMemory, options: OptimizerConfig, mesh: Mesh, lazy: bool = True) -> None:
        """Take over the updates.

        Args:
            lazy: defer the updates of clusters without tokens.
        """
        self.memory, self._options, self._mesh, self._lazy = memory, options, mesh, lazy
        self.steps = self.updates = self.deferred = self.longest = 0
        self._rates: list[float] = []  # learning rates of the last steps, as many as the cluster furthest behind needs
        self._square: dict[Place, Tensor] = {}
        self._active: list[OffloadedCluster] = []
        memory.on_gradient, memory.on_use = self._finish_without_replicas, self.catch_up
        held = {class_of(parameter) for parameter in memory.parameters()}
        widest = ParameterClass.BASE if ParameterClass.BASE in held else ParameterClass.EXPERT
        self._replicas = mesh.group(REDUCED_OVER[widest])  # of a base, they include those of its residuals
        self._replicated = self._replicas.size > 1

    def finish_gradients(self) -> Tensor:
        """Reduce all gradients of a step; return this rank's part of the squared norm, float64. Collective."""
        self._active = self._find_active()
        for cluster in self._active:
            place = cluster.layer, cluster.local
            if place not in self._square and (cluster.has_gradient or self._replicated):
                with self._gradient(cluster) as gradient:
                    self._square[place] = self._finish(cluster, gradient)
        nothing = torch.zeros((), dtype=torch.float64)
        parts = [self._square.get(place, nothing) for place in self.memory.clusters]
        self._square.clear()
        return torch.stack(parts).sum() if parts else nothing

    @torch.no_grad()
    def step(self, learning_rate: float, clip_factor: Tensor | None) -> None:
        """Update moments and weights of all clusters, or defer it, and drop their gradients."""
        for index, cluster in enumerate(self._active):
            for following in self._active[index + 1 : index + 2]:
                self._prefetch(following)
            self.catch_up(cluster)
            self._step_cluster(cluster, learning_rate, clip_factor)
        active = set(self._active)
        for cluster in self.memory.clusters.values():
            if cluster not in active:
                cluster.behind += 1
                self.deferred += 1
        furthest = max((cluster.behind for cluster in self.memory.clusters.values()), default=0)
        self._rates.append(learning_rate)
        del self._rates[: len(self._rates) - furthest]
        self.longest = max(self.longest, furthest)
        self.updates += len(self.memory.clusters)
        self.steps += 1

    def discard_gradients(self) -> None:
        """Drop the gradients of a step that is skipped."""
        self._square.clear()
        for cluster in self.memory.clusters.values():
            if cluster.has_gradient:
                self.memory.device.drop(cluster.block(TensorKind.GRADIENT))
                cluster.has_gradient = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the offloaded parameters."""
        return self.memory.parameters()

    @torch.no_grad()
    def catch_up(self, cluster: OffloadedCluster) -> None:
        """Make the deferred updates of a cluster."""
        if not cluster.behind:
            return
        missed = list(enumerate(self._rates[-cluster.behind :], self.steps - cluster.behind))
        cluster.behind = 0
        with self._blocks(cluster, without=(TensorKind.GRADIENT,)) as blocks:
            zeros = torch.zeros(CHUNK, device=_master(blocks).device)
            for rule, run in self._rules(cluster):
                for first in range(run.start, run.stop, CHUNK):
                    chunk = slice(first, min(first + CHUNK, run.stop))
                    for step, rate in missed:
                        self._adamw(blocks, zeros[: chunk.stop - first], chunk, step, rate, rule)
            _round_weights(blocks)

    def _find_active(self) -> list[OffloadedCluster]:
        """Return the clusters that have a gradient on any of their replicas; all if updates are not lazy."""
        clusters = list(self.memory.clusters.values())
        if not self._lazy:
            return clusters
        device = next(self.memory.parameters()).device
        flags = torch.tensor([cluster.has_gradient for cluster in clusters], dtype=torch.int32, device=device)
        if self._replicated:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._replicas.handle)
        return [cluster for cluster, flag in zip(clusters, flags.tolist(), strict=True) if flag]

    def _finish_without_replicas(self, cluster: OffloadedCluster, gradient: Tensor) -> None:
        """Finish a gradient right after its backward pass, while it is on the device, if there are no replicas."""
        if not self._replicated:
            self._square[cluster.layer, cluster.local] = self._finish(cluster, gradient)

    @torch.no_grad()
    def _finish(self, cluster: OffloadedCluster, gradient: Tensor) -> Tensor:
        """Reduce a gradient over replicas, divide it by the number of ranks, return its squared norm / copies."""
        square = torch.zeros((), dtype=torch.float64, device=gradient.device)
        views = cluster.layout.views(gradient)
        for name, parameter in cluster.parameters.items():
            copies = copies_of(parameter, self._mesh)
            if copies > 1:
                dist.all_reduce(views[name], group=self._mesh.group(REDUCED_OVER[class_of(parameter)]).handle)
            views[name].div_(self._mesh.shape.stage_ranks)
            square += torch.linalg.vector_norm(views[name], dtype=torch.float64).square() / copies
        return square.cpu()

    @contextmanager
    def _gradient(self, cluster: OffloadedCluster) -> Iterator[Tensor]:
        block, device = cluster.block(TensorKind.GRADIENT), self.memory.device
        gradient = device.acquire(block, zero_init=not cluster.has_gradient)
        cluster.has_gradient = True
        try:
            yield gradient
        finally:
            device.release(block, changed=True)

    def _prefetch(self, cluster: OffloadedCluster) -> None:
        kinds = [kind for kind in cluster.sizes() if kind is not TensorKind.GRADIENT or cluster.has_gradient]
        self.memory.state.prefetch([cluster.block(kind) for kind in kinds])

    def _step_cluster(self, cluster: OffloadedCluster, learning_rate: float, clip_factor: Tensor | None) -> None:
        with self._blocks(cluster) as blocks:
            gradient = blocks[TensorKind.GRADIENT]
            if clip_factor is not None:
                gradient.mul_(clip_factor.to(gradient.device))
            for rule, run in self._rules(cluster):
                self._adamw(blocks, gradient[run], run, self.steps, learning_rate, rule)
            _round_weights(blocks)
        self.memory.state.drop(cluster.block(TensorKind.GRADIENT))
        cluster.has_gradient = False

    def _rules(self, cluster: OffloadedCluster) -> Iterator[tuple[UpdateRule, slice]]:
        """Yield runs of neighboring parameters with one update rule."""
        rules = [update_rule(name, parameter, self._options) for name, parameter in cluster.parameters.items()]
        return cluster.layout.runs(rules)

    def _adamw(
        self, blocks: Blocks, gradient: Tensor, run: slice, step: int, learning_rate: float, rule: UpdateRule
    ) -> None:
        """Update a run of elements in place.

        Args:
            gradient: gradient of the run.
            step: number of updates made before.
        """
        moments = blocks[TensorKind.EXP_AVG][run], blocks[TensorKind.EXP_AVG_SQ][run]
        adamw_step(_master(blocks)[run], gradient, moments, step, learning_rate, rule, self._options)

    @contextmanager
    def _blocks(self, cluster: OffloadedCluster, without: tuple[TensorKind, ...] = ()) -> Iterator[Blocks]:
        """Acquire the cluster's blocks on the tier of the training state; device copies are evicted to it first."""
        memory = self.memory
        with ExitStack() as held:
            blocks = {}
            for kind in cluster.sizes():
                if kind in without:
                    continue
                block = cluster.block(kind)
                if memory.state is not memory.device and kind in (TensorKind.WEIGHT, TensorKind.GRADIENT):
                    memory.device.evict(block)
                idle = kind is not TensorKind.WEIGHT
                zero_init = kind is TensorKind.GRADIENT and not cluster.has_gradient
                blocks[kind] = held.enter_context(
                    memory.state.pinned(block, changed=True, idle=idle, zero_init=zero_init)
                )
            yield blocks


def _master(blocks: Blocks) -> Tensor:
    """Return the float32 master weights; float32 weights are their own."""
    return blocks.get(TensorKind.MASTER, blocks[TensorKind.WEIGHT])


def _round_weights(blocks: Blocks) -> None:
    """Copy separate master weights to the weights."""
    if TensorKind.MASTER in blocks:
        blocks[TensorKind.WEIGHT].copy_(blocks[TensorKind.MASTER])
