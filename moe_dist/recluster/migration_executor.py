"""Moves experts and clusters of a model under training to where a decision wants them; collective throughout.

What moves arrives and is verified before anything is switched on all ranks together. Exchanges of experts are tried
on tokens that the model was not trained on, and those that would cost too much are not made.

Shapes: B sequences, S tokens of one.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.recluster.exchange import Cycle, apply_exchanges, exchanges
from moe_dist.recluster.expert_tensors import ExpertTensors
from moe_dist.recluster.guard import accept
from moe_dist.recluster.migration_plan import MigrationPlan, PieceKind, plan_layer
from moe_dist.recluster.refit import Refit, RefitResult, make_moves
from moe_dist.recluster.transfer import carry

Move = tuple[int, Cycle]
"""A layer, and experts of it that exchange their places."""


class MigrationExecutor:
    """Carries out what has been decided, on the experts as they are now."""

    def __init__(self, engine: DeepSpeedEngine, largest_increase: float) -> None:
        """
        Args:
            largest_increase: of the loss, relative, that exchanges may cost.
        """
        self._engine, self._model, self._limit = engine, engine.model, largest_increase
        self._process, self._context = engine.process, engine.model.context
        self._layers = engine.model.clustered_layers()

    @property
    def tensors(self) -> ExpertTensors:
        """The experts' weights and training state as they are now; collective."""
        return ExpertTensors(self._layers, self._engine.training_state(), self._context.mesh)

    def relocate(self, blocks: Sequence[tuple[int, ...]]) -> int:
        """Moves whole clusters to other ranks, by layer; returns the bytes that crossed. Collective.

        One closed cycle of clusters at a time, in which each rank gives and takes one at most: with its bases and
        training state a cluster is large, and what moves is held beside a rank's share until all of it is there.
        """
        tensors, crossed = self.tensors, 0
        for layer, wanted in enumerate(blocks):
            for cycle in exchanges(self._context.placements[layer].block_of_cluster, wanted):
                old = list(self._context.placements)
                new = [*old[:layer], _turned(old[layer], cycle), *old[layer + 1 :]]
                plan = self._plan(new, tensors)
                carry(plan, self._process.rank, tensors, self._process.device).settle()
                self._switch(new)
                crossed += plan.bytes
        return crossed

    def exchange(self, moves: Sequence[Move], held_BS: Tensor) -> tuple[list[Move], int, float]:
        """Moves experts between clusters, unless that would raise the loss on `held_BS` too much.

        Returns:
            The moves made, the bytes that crossed, and the relative increase of the loss that the guard saw.
        """
        old = list(self._context.placements)
        tensors = self.tensors
        plan = self._plan(_after(old, moves), tensors)
        arrived = carry(plan, self._process.rank, tensors, self._process.device)
        base = self._loss_of(held_BS) if moves else 0.0
        seen: dict[tuple[Move, ...], float] = {}

        def harm(some: Sequence[Move]) -> float:
            movers = executors_of(some)
            replaced = arrived.try_out(
                lambda p: p.target.kind is PieceKind.WEIGHT and (p.source.layer, p.expert) in movers
            )
            self._switch(_after(old, some))
            seen[tuple(some)] = self._loss_of(held_BS) / base - 1
            replaced.settle()
            self._switch(old)
            return seen[tuple(some)]

        made = accept(list(moves), harm, self._limit)
        movers = executors_of(made)
        arrived.settle(lambda p: (p.source.layer, p.expert) in movers)
        self._switch(_after(old, made))
        return made, plan.bytes, seen.get(tuple(made), 0.0)

    def refactor(
        self, moves: Sequence[Move], sequences_BS: Tensor, held_BS: Tensor
    ) -> tuple[list[Move], RefitResult, float]:
        """Like `exchange`, but clusters whose members change get new bases and residuals, made from `sequences_BS`."""
        old = list(self._context.placements)
        return make_moves(
            moves,
            Refit(self._engine, sequences_BS),
            after=lambda some: _after(old, some),
            switch=self._switch,
            loss=lambda: self._loss_of(held_BS),
            limit=self._limit,
        )

    def _plan(self, new: Sequence[ExpertPlacement], tensors: ExpertTensors) -> MigrationPlan:
        shape = self._context.mesh.shape
        pieces = [
            piece
            for layer, (before, after) in enumerate(zip(self._context.placements, new, strict=True))
            if after is not before
            for piece in plan_layer(layer, before, after, shape, tensors.holdings)
        ]
        return MigrationPlan(tuple(pieces), tensors.holdings.itemsize)

    def _switch(self, placements: Sequence[ExpertPlacement]) -> None:
        self._context.placements[:] = placements
        for layer in self._layers:
            layer.follow_placement()

    def _loss_of(self, sequences_BS: Tensor) -> float:
        """Mean loss over all ranks' sequences, nats a token; collective."""
        with self._model.evaluating():
            loss = self._model(sequences_BS.to(self._process.device)).double()
        dist.all_reduce(loss)
        return float(loss) / self._process.ranks


def _after(placements: Sequence[ExpertPlacement], moves: Sequence[Move]) -> list[ExpertPlacement]:
    cycles = {layer: [cycle for other, cycle in moves if other == layer] for layer, _ in moves}
    return [
        apply_exchanges(placement, cycles[layer]) if layer in cycles else placement
        for layer, placement in enumerate(placements)
    ]


def _turned(placement: ExpertPlacement, cycle: Cycle) -> ExpertPlacement:
    """After each cluster of a cycle has taken the block of the one after it."""
    blocks = list(placement.block_of_cluster)
    for cluster, following in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
        blocks[cluster] = placement.block_of_cluster[following]
    return placement.with_blocks(blocks)


def executors_of(moves: Sequence[Move]) -> set[tuple[int, int]]:
    """The experts that change their places, each as (layer, expert)."""
    return {(layer, expert) for layer, cycle in moves for expert in cycle}
