"""Migration executor: moves experts and clusters of a model in training according to a plan; collective.

All data is received and verified before all ranks switch together. Exchanges of experts are tested on tokens that the
model was not trained on; those that would raise the loss too much are not made.

Shapes: B sequences, S tokens of a sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.agreement import gather_over_stages
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.recluster.exchange import Cycle, apply_exchanges, exchanges
from moe_dist.recluster.expert_tensors import ExpertTensors
from moe_dist.recluster.guard import make_guarded
from moe_dist.recluster.migration_plan import MigrationPlan, PieceKind, plan_layer
from moe_dist.recluster.refit import Refit, RefitResult
from moe_dist.recluster.transfer import Arrivals, carry

Move = tuple[int, Cycle]
"""Layer, and experts of it that exchange their slots."""
Switch = Callable[[Sequence[ExpertPlacement]], None]
"""Function that makes all layers route by these placements."""


@dataclass
class Adopt:
    """Transition in which a moved expert keeps its residuals and adopts the base of its new cluster."""

    old: list[ExpertPlacement]
    arrivals: Arrivals
    switch: Switch
    replaced: Arrivals | None = None

    def apply(self, moves: Sequence[Move]) -> None:
        """Write the weights of the moved experts on trial."""
        movers = movers_of(moves)
        self.replaced = self.arrivals.try_out(
            lambda p: p.target.kind is PieceKind.WEIGHT and (p.source.layer, p.expert) in movers
        )
        self.switch(after_moves(self.old, moves))

    def revert(self) -> None:
        """Restore the weights that were replaced."""
        assert self.replaced is not None
        self.replaced.settle()
        self.switch(self.old)

    def commit(self, moves: Sequence[Move]) -> None:
        """Write weights and training state of the moved experts permanently."""
        movers = movers_of(moves)
        self.arrivals.settle(lambda p: (p.source.layer, p.expert) in movers)
        self.switch(after_moves(self.old, moves))


@dataclass
class RefitTransition:
    """Transition in which clusters whose members change get new bases and residuals."""

    old: list[ExpertPlacement]
    refit: Refit
    switch: Switch
    done: RefitResult | None = None

    def apply(self, moves: Sequence[Move]) -> None:
        """Write new bases and residuals on trial."""
        new = after_moves(self.old, moves)
        self.done = self.refit.apply(new)
        self.switch(new)

    def revert(self) -> None:
        """Restore everything that was replaced."""
        assert self.done is not None
        self.switch(self.old)
        self.refit.take_back(self.done)

    def commit(self, moves: Sequence[Move]) -> None:
        """Write new bases and residuals permanently."""
        self.apply(moves)
        assert self.done is not None
        self.refit.forget(self.done)


class MigrationExecutor:
    """Executor of re-clustering plans."""

    def __init__(self, engine: DeepSpeedEngine, largest_increase: float) -> None:
        """Use an engine's experts, mesh and placements.

        Args:
            largest_increase: largest relative increase of the loss by exchanges.
        """
        self._engine, self._model, self._limit = engine, engine.model, largest_increase
        self._process, self._context = engine.process, engine.model.context
        self._layers = engine.model.clustered_layers()

    @property
    def tensors(self) -> ExpertTensors:
        """Current weights and training state of the experts; collective."""
        return ExpertTensors(self._layers, self._engine.training_state(), self._context.mesh)

    def relocate(self, blocks: Sequence[tuple[int, ...]]) -> int:
        """Move whole clusters to other ranks, layer by layer; return the bytes sent between ranks. Collective.

        One cycle of clusters is moved at a time, in which each rank sends and receives at most one cluster: with its
        base and training state a cluster is large, and received data is buffered until all of it is verified.

        Args:
            blocks: new block of each cluster of each layer.
        """
        tensors, crossed = self.tensors, 0
        for layer, wanted in enumerate(blocks):
            for cycle in exchanges(self._context.placements[layer].block_of_cluster, wanted):
                old = list(self._context.placements)
                new = [*old[:layer], _after_relocation(old[layer], cycle), *old[layer + 1 :]]
                plan = self._plan(new, tensors)
                carry(plan, self._process.rank, tensors, self._process.device).settle()
                self._switch(new)
                crossed += plan.bytes
        return sum(gather_over_stages(self._context.mesh, crossed))

    def exchange(self, moves: Sequence[Move], held_BS: Tensor) -> tuple[list[Move], int, float]:
        """Move experts between clusters, except those that would raise the loss on `held_BS` too much.

        Returns:
            The moves made, the bytes sent between ranks, and the relative increase of the loss on `held_BS`.
        """
        if not moves:
            return [], 0, 0.0
        old, tensors = list(self._context.placements), self.tensors
        plan = self._plan(after_moves(old, moves), tensors)
        arrivals = carry(plan, self._process.rank, tensors, self._process.device)
        adopt = Adopt(old, arrivals, self._switch)
        made, increase = make_guarded(moves, adopt, lambda: self._loss_of(held_BS), self._limit)
        return made, sum(gather_over_stages(self._context.mesh, plan.bytes)), increase

    def refit(
        self, moves: Sequence[Move], sequences_BS: Tensor, held_BS: Tensor
    ) -> tuple[list[Move], RefitResult, float]:
        """Move experts like `exchange`, with new bases and residuals fitted on `sequences_BS` in changed clusters."""
        transition = RefitTransition(list(self._context.placements), Refit(self._engine, sequences_BS), self._switch)
        made, increase = make_guarded(moves, transition, lambda: self._loss_of(held_BS), self._limit)
        assert transition.done is not None
        found = gather_over_stages(self._context.mesh, (transition.done.bytes, transition.done.errors))
        errors = {layer: of_layer for _, of_stage in found for layer, of_layer in of_stage.items()}
        return made, RefitResult(bytes=sum(sent for sent, _ in found), errors=errors), increase

    def _plan(self, new: Sequence[ExpertPlacement], tensors: ExpertTensors) -> MigrationPlan:
        """Return the pieces of this pipeline stage's layers."""
        shape, placements = self._context.mesh.shape, self._context.placements
        pieces = [
            piece
            for layer in (layer.layer for layer in self._layers)
            if new[layer] is not placements[layer]
            for piece in plan_layer(layer, placements[layer], new[layer], shape, tensors.holdings)
        ]
        return MigrationPlan(tuple(pieces), tensors.holdings.itemsize)

    def _switch(self, placements: Sequence[ExpertPlacement]) -> None:
        self._context.placements[:] = placements
        for layer in self._layers:
            layer.follow_placement()

    def _loss_of(self, sequences_BS: Tensor) -> float:
        """Return the mean loss over all ranks' sequences, nats per token; collective."""
        with self._model.evaluating():
            loss = self._model(sequences_BS.to(self._process.device)).double()
        dist.all_reduce(loss)
        return float(loss) / self._context.mesh.shape.stage_ranks


def after_moves(placements: Sequence[ExpertPlacement], moves: Sequence[Move]) -> list[ExpertPlacement]:
    """Return the placements after the moves."""
    cycles = {layer: [cycle for other, cycle in moves if other == layer] for layer, _ in moves}
    return [
        apply_exchanges(placement, cycles[layer]) if layer in cycles else placement
        for layer, placement in enumerate(placements)
    ]


def _after_relocation(placement: ExpertPlacement, cycle: Cycle) -> ExpertPlacement:
    """Return the placement after each cluster of a cycle has taken the block of the next."""
    blocks = list(placement.block_of_cluster)
    for cluster, following in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
        blocks[cluster] = placement.block_of_cluster[following]
    return placement.with_blocks(blocks)


def movers_of(moves: Sequence[Move]) -> set[tuple[int, int]]:
    """Return the experts that change their slots, each as (layer, expert)."""
    return {(layer, expert) for layer, cycle in moves for expert in cycle}
