"""The transition `refactor` of a re-clustering: experts that change clusters keep their effective weights.

Clusters whose members change get a new base, the mean by usage of their members' effective weights, and all their
members new residuals; the others are not touched. (`adopt`, in `recluster.py`, keeps residuals and bases instead.)
Factors start with zero moments, bases and vectors keep theirs.

Shapes: B sequences, S tokens of one.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from moe_dist.conversion.calibration_tokens import sample_tokens
from moe_dist.conversion.compress import CompressedLayer, compress_layer
from moe_dist.conversion.expert_grouping import usage_of
from moe_dist.conversion.read_clustered_experts import read_clustered_experts
from moe_dist.conversion.write_parameters import parameters_of, write_layer
from moe_dist.distributed.mesh import GroupKind
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.engine.gathered_optimizer_state import OwnedState, restore
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.recluster.guard import accept

Change = TypeVar("Change", bound=Hashable)


def changed_clusters(old: ExpertPlacement, new: ExpertPlacement) -> list[int]:
    """Clusters that do not keep all their members, wherever these sit."""
    return [c for c in range(old.clusters) if set(old.members[c]) != set(new.members[c])]


@dataclass
class RefitResult:
    """What was written on this rank, and what it replaced."""

    saved: list[tuple[nn.Parameter, Tensor, OwnedState]] = field(default_factory=list)
    bytes: int = 0
    """That crossed between ranks, all of them together."""
    errors: dict[int, dict[int, float]] = field(default_factory=dict)
    """`|y' - y| / |y|` on real tokens, by layer and expert."""


class Refit:
    """Tries placements on the experts as they are now; every try can be taken back."""

    def __init__(self, engine: DeepSpeedEngine, sequences_BS: Tensor) -> None:
        """Catches tokens of a batch, half of them (where there are two sequences) to check on; collective."""
        self._engine, self._model = engine, engine.model
        config, at_once = engine.config, engine.batch.micro
        halves = (sequences_BS[0::2], sequences_BS[1::2]) if len(sequences_BS) > 1 else (sequences_BS, sequences_BS)
        micro = [half.to(engine.process.device).split(at_once) for half in halves]
        (self._fit, _), (self._check, _) = (sample_tokens(self._model, batches) for batches in micro)
        self._config = config

    def apply(self, new: Sequence[ExpertPlacement]) -> RefitResult:
        """Writes what the new placements ask for; the layers still have to follow them. Collective."""
        done, state = RefitResult(), self._engine.training_state()
        for number, layer in enumerate(self._model.clustered_layers()):
            if clusters := changed_clusters(layer.placement, new[number]):
                compressed = self._compress(layer, new[number], clusters)
                for _, parameters in parameters_of(compressed, layer):
                    for parameter in parameters.values():
                        owned = OwnedState.of(state, parameter, self._model.context.mesh)
                        done.saved.append((parameter, parameter.detach().clone(), owned.copy()))
                write_layer(compressed, layer, state)
                self._enter(done, number, compressed, new[number], clusters)
        return done

    def take_back(self, done: RefitResult) -> None:
        """Everything as it was before, to the last bit."""
        state = self._engine.training_state()
        for parameter, value, owned in done.saved:
            restore(state, parameter, value, owned)

    def _compress(self, layer: ClusteredMoE, new: ExpertPlacement, clusters: list[int]) -> CompressedLayer:
        mesh, config = self._model.context.mesh, self._config
        fit, check = self._fit[layer.layer], self._check[layer.layer]
        usage_E = usage_of(fit, check, new.experts, mesh.group(GroupKind.EXPERT_PARALLEL))
        held = read_clustered_experts(layer, self._engine.training_state(), fit, check, clusters)
        return compress_layer(held, new, usage_E, config.moe, mesh, config.seed, clusters)

    def _enter(
        self, done: RefitResult, number: int, compressed: CompressedLayer, new: ExpertPlacement, clusters: list[int]
    ) -> None:
        done.bytes += compressed.bytes * self._model.context.mesh.shape.data
        members = [expert for cluster in clusters for expert in new.members[cluster]]
        done.errors[number] = {expert: float(compressed.output_error_E[expert]) for expert in members}


def make_moves(
    moves: Sequence[Change],
    refactoring: Refit,
    *,
    after: Callable[[Sequence[Change]], list[ExpertPlacement]],
    switch: Callable[[Sequence[ExpertPlacement]], None],
    loss: Callable[[], float],
    limit: float,
) -> tuple[list[Change], RefitResult, float]:
    """Makes those moves that do not raise the loss too much; collective.

    Args:
        after: the placements that some of the moves lead to.
        switch: lets the layers follow placements.
        loss: on tokens held back.
        limit: largest relative increase.

    Returns:
        The moves made, what they wrote, and the relative increase of the loss that was seen.
    """
    base = loss()
    seen: dict[tuple[Change, ...], float] = {(): 0.0}

    def harm(some: Sequence[Change]) -> float:
        tried = refactoring.apply(after(some))
        switch(after(some))
        seen[tuple(some)] = loss() / base - 1
        switch(after(()))
        refactoring.take_back(tried)
        return seen[tuple(some)]

    made = accept(list(moves), harm, limit)
    done = refactoring.apply(after(made))
    switch(after(made))
    return made, done, seen[tuple(made)]
