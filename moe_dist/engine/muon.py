"""Muon for matrices (`optimizer.kind=muon`): of attention, feed-forward layers, bases and standard experts.

Muon orthogonalizes the momentum of a whole matrix, which DeepSpeed's flat partitions would cut. Therefore DeepSpeed
does not handle these parameters: gradients are summed over the replicas in float32, divided by the number of ranks,
included in the global norm and clipped by it. Under ZeRO each matrix has one *owner* among its replicas: gradients are
reduced to it, it alone has master weights and momentum and makes the update, and it broadcasts the new weights.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon

from moe_dist.config import OptimizerConfig, RunConfig
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.optimizer import FEED_FORWARD, MOMENTS, update_rule
from moe_dist.moe.parameter_class import REDUCED_OVER, class_of, replicas_of

MUON_MOMENTS = MOMENTS[:1]
"""Names of Muon's moments: its momentum is a moving average of gradients, as AdamW's first moment."""


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return True if Muon updates a parameter; embeddings, output layer, routers and low-rank factors have AdamW."""
    return parameter.ndim == 2 and (".self_attention." in name or bool(FEED_FORWARD & set(name.split("."))))


class MatrixMuon:
    """Optimizer of all matrices of a model."""

    def __init__(self, model: nn.Module, config: RunConfig, mesh: Mesh) -> None:
        """Choose the owner of each matrix, cast it to the type of training, and take over the updates."""
        self._options, self._mesh = config.optimizer, mesh
        self.divided, self._half = config.world.zero_stage > 0, config.train.precision != "float32"
        self._names = {parameter: name for name, parameter in model.named_parameters() if is_matrix(name, parameter)}
        self._ranks = {parameter: replicas_of(class_of(parameter), mesh) for parameter in self._names}
        self._owners = dict(self._choose_owners())
        owned = [parameter for parameter in self._names if self._owns(parameter)]
        self._masters = {one: one.detach().float().clone() if self._half else one for one in owned}
        self._momentum = {one: torch.zeros_like(one, dtype=torch.float32, requires_grad=False) for one in owned}
        for parameter in self._names if self._half else ():
            parameter.data = parameter.data.to(getattr(torch, config.train.precision))
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def __contains__(self, parameter: object) -> bool:
        """Return True if Muon updates a parameter."""
        return parameter in self._names

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the matrices."""
        return iter(self._names)

    def has_separate_master(self) -> bool:
        """Return True if master weights are separate from the parameters: with types other than float32."""
        return self._half

    def owned(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """Return master weights and momentum of a matrix, float32, in its shape; None: another replica owns them."""
        if parameter not in self._masters:
            return None
        return self._masters[parameter].detach(), self._momentum[parameter]

    @torch.no_grad()
    def finish_gradients(self) -> Tensor:
        """Reduce the gradients of a step; return this rank's part of the squared norm, float64. Collective."""
        gradients, pending = {}, []
        for parameter in self._names:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[parameter], parameter.grad = found.float().contiguous(), None
            pending.append(self._reduce(parameter, gradients[parameter]))
        for work in pending:
            if work is not None:
                work.wait()
        square = torch.zeros((), dtype=torch.float64)
        self._gradients = {parameter: gradients[parameter] for parameter in self._masters}
        for parameter, gradient in self._gradients.items():
            gradient.div_(self._mesh.shape.stage_ranks)
            copies = 1 if self.divided else len(self._ranks[parameter])
            square += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().cpu() / copies
        return square

    @torch.no_grad()
    def step(self, learning_rate: float, clip_factor: Tensor | None) -> None:
        """Update weights and momentum with the reduced gradients; collective under ZeRO."""
        for parameter, gradient in self._gradients.items():
            if clip_factor is not None:
                gradient.mul_(clip_factor.to(gradient.device))
            rule = update_rule(self._names[parameter], parameter, self._options)
            master = self._masters[parameter]
            rate = learning_rate * rule.lr_scale
            muon_step(master, gradient, self._momentum[parameter], rate, rule.weight_decay, self._options)
            if self._half:
                parameter.copy_(master)
        self._gradients.clear()
        if self.divided:
            self._broadcast()

    def sent(self) -> dict[int, float]:
        """Return the bytes that this rank sends to each other rank in a step; reduces and broadcasts are chains."""
        found = dict.fromkeys(range(dist.get_world_size()), 0.0)
        for parameter, ranks in self._ranks.items():
            size, me, owner = len(ranks), ranks.index(self._mesh.rank), ranks.index(self._owners[parameter])
            gradient, weight = 4 * parameter.numel(), parameter.element_size() * parameter.numel()
            before, after = ranks[me - 1], ranks[(me + 1) % size]
            if not self.divided:
                found[after] += 2 * (size - 1) / size * gradient
                continue
            found[before] += gradient * (me != owner)
            found[after] += weight * (after != ranks[owner])
        return found

    def discard_gradients(self) -> None:
        """Drop the gradients of a step that is skipped."""
        self._gradients.clear()

    def _choose_owners(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield the rank that owns each matrix under ZeRO, alike in every block.

        The largest matrix goes first, each to the replica with the fewest elements.
        """
        load: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for parameter, ranks in sorted(self._ranks.items(), key=lambda pair: -pair[0].numel()):
            held = load.setdefault((class_of(parameter), ranks), [0] * len(ranks))
            index = held.index(min(held))
            held[index] += parameter.numel()
            yield parameter, ranks[index]

    def _owns(self, parameter: nn.Parameter) -> bool:
        return not self.divided or self._owners[parameter] == self._mesh.rank

    def _reduce(self, parameter: nn.Parameter, gradient: Tensor) -> dist.Work | None:
        """Start the sum of a gradient over its replicas, on the owner alone under ZeRO; None: there is one replica."""
        work: dist.Work | None = None
        group = self._group(parameter)
        if len(self._ranks[parameter]) > 1 and self.divided:
            work = dist.reduce(gradient, self._owners[parameter], group=group, async_op=True)
        elif len(self._ranks[parameter]) > 1:
            work = dist.all_reduce(gradient, group=group, async_op=True)
        return work

    def _broadcast(self) -> None:
        """Send every updated matrix from its owner to the other replicas."""
        pending = [
            dist.broadcast(parameter.detach(), self._owners[parameter], group=self._group(parameter), async_op=True)
            for parameter, ranks in self._ranks.items()
            if len(ranks) > 1
        ]
        for work in pending:
            work.wait()

    def _group(self, parameter: nn.Parameter) -> dist.ProcessGroup | None:
        kind = REDUCED_OVER.get(class_of(parameter))
        return self._mesh.stage_group if kind is None else self._mesh.group(kind).handle


def muon_step(
    master: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    learning_rate: float,
    weight_decay: float,
    options: OptimizerConfig,
) -> None:
    """Update a matrix and its momentum in place by torch's Muon.

    Its update has the root mean square of AdamW's (0.2, Liu et al., 2025), so that the same learning rate fits both.
    """
    muon(
        [master], [gradient], [momentum], lr=learning_rate, weight_decay=weight_decay,
        momentum=options.muon_momentum, nesterov=True, ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
        ns_steps=DEFAULT_NS_STEPS, eps=EPS, adjust_lr_fn="match_rms_adamw", has_complex=False,
    )  # fmt: skip
