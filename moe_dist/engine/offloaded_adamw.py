"""AdamW for offloaded experts, cluster by cluster, on the memory tier of their training state.

DeepSpeed does not handle these parameters. Their update has the same steps in the same order and with the same
arithmetic as DeepSpeed's: gradients are summed over the replicas, divided by the number of ranks, included in the
global norm and clipped by it, and torch's fused AdamW updates the weights. In float32 on a CPU the result is
bit-identical. DeepSpeed's CPU Adam is not used, because it rounds differently from the optimizer of the other
parameters.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from moe_dist.config import OptimizerConfig
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.optimizer import UpdateRule, update_rule
from moe_dist.memory.block import TensorKind
from moe_dist.memory.expert_memory import ExpertMemory, Place
from moe_dist.memory.offloaded_cluster import OffloadedCluster
from moe_dist.model.language_model import copies_of
from moe_dist.moe.parameter_class import REDUCED_OVER, class_of


class OffloadedAdamW:
    """Optimizer of all clusters in an `ExpertMemory`."""

    def __init__(self, memory: ExpertMemory, options: OptimizerConfig, mesh: Mesh) -> None:
        self.memory, self._options, self._mesh = memory, options, mesh
        self.steps = 0
        self._square: dict[Place, Tensor] = {}
        memory.on_gradient = self._finish_without_replicas
        self._replicated = any(copies_of(parameter, mesh) > 1 for parameter in memory.parameters())

    def finish_gradients(self) -> Tensor:
        """Reduce all gradients of a step; return this rank's part of the squared norm, float64. Collective."""
        for place, cluster in self.memory.clusters.items():
            if place not in self._square and (cluster.has_gradient or self._replicated):
                with self._gradient(cluster) as gradient:
                    self._square[place] = self._finish(cluster, gradient)
        parts = [self._square[place] for place in self.memory.clusters if place in self._square]
        self._square.clear()
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def step(self, learning_rate: float, clip_factor: Tensor | None) -> None:
        """Update moments and weights of all clusters, and drop their gradients."""
        clusters = list(self.memory.clusters.values())
        for index, cluster in enumerate(clusters):
            for following in clusters[index + 1 : index + 2]:
                self._prefetch(following)
            self._step_cluster(cluster, learning_rate, clip_factor)
        self.steps += 1

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
            views[name].div_(self._mesh.shape.ranks)
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
        gradient_block = cluster.block(TensorKind.GRADIENT)
        with self._blocks(cluster) as blocks:
            gradient = blocks[TensorKind.GRADIENT]
            if clip_factor is not None:
                gradient.mul_(clip_factor.to(gradient.device))
            master = blocks.get(TensorKind.MASTER, blocks[TensorKind.WEIGHT])
            rules = [update_rule(name, parameter, self._options) for name, parameter in cluster.parameters.items()]
            for rule, run in cluster.layout.runs(rules):
                moments = (blocks[TensorKind.EXP_AVG][run], blocks[TensorKind.EXP_AVG_SQ][run])
                self._adamw(master[run], gradient[run], *moments, learning_rate, rule)
            if master is not blocks[TensorKind.WEIGHT]:
                blocks[TensorKind.WEIGHT].copy_(master)
        self.memory.state.drop(gradient_block)
        cluster.has_gradient = False

    def _adamw(
        self, master: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, learning_rate: float, rule: UpdateRule
    ) -> None:
        options = self._options
        adamw(
            [master], [gradient], [mean], [square], [], [torch.tensor(float(self.steps), device=master.device)],
            fused=True, amsgrad=False, beta1=options.beta1, beta2=options.beta2, lr=learning_rate * rule.lr_scale,
            weight_decay=rule.weight_decay, eps=options.epsilon, maximize=False,
        )  # fmt: skip

    @contextmanager
    def _blocks(self, cluster: OffloadedCluster) -> Iterator[dict[TensorKind, Tensor]]:
        """Acquire the cluster's blocks on the tier of the training state; device copies are evicted to it first."""
        memory = self.memory
        with ExitStack() as held:
            blocks = {}
            for kind in cluster.sizes():
                block = cluster.block(kind)
                if memory.state is not memory.device and kind in (TensorKind.WEIGHT, TensorKind.GRADIENT):
                    memory.device.evict(block)
                idle = kind is not TensorKind.WEIGHT
                zero_init = kind is TensorKind.GRADIENT and not cluster.has_gradient
                blocks[kind] = held.enter_context(
                    memory.state.pinned(block, changed=True, idle=idle, zero_init=zero_init)
                )
            yield blocks
