"""Experts and clusters move between ranks with all they have, and training goes on as if nothing had happened."""

from dataclasses import dataclass
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import WorldShape, load_config, resolve_batch
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.errors import MoeDistError
from moe_dist.metrics.recorder import Recorder
from moe_dist.model.language_model import LanguageModel
from moe_dist.recluster import transfer
from moe_dist.recluster.coordinator import Coordinator
from moe_dist.recluster.migration_executor import Move
from moe_dist.recluster.recluster_plan import ReclusterPlan, broadcast_plan
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine_equality import SEQUENCES, SMALL, VOCABULARY, _weights_by_global_name

pytestmark = pytest.mark.timeout(400)
RECLUSTER = ["moe.expert_hidden=16", "recluster.period=2", "recluster.start=1", "recluster.max_loss_increase=1e9"]
MOVES: list[Move] = [(0, (0, 5)), (0, (1, 6, 11)), (1, (2, 13))]  # sixteen experts, four in each of four clusters
BLOCKS = {4: [(2, 3, 0, 1), (0, 1, 2, 3)], 2: [(1, 0, 0, 1), (0, 0, 1, 1)], 1: [(0, 0, 0, 0), (0, 0, 0, 0)]}


@dataclass
class Story:
    """What one rank of a run saw."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    bytes: int
    moved: list[Move]
    increase: float


class Training:
    """A small model, step by step."""

    def __init__(self, axes: tuple[int, int, int], words: list[str]) -> None:
        config = load_config(None, [*SMALL, *RECLUSTER, *words])
        process = init_distributed(config.world)
        mesh = Mesh.create(WorldShape(*axes), timedelta(seconds=60))
        batch = resolve_batch(config, process.ranks)
        self.config, self.process = config, process
        self.model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation)
        self.engine = DeepSpeedEngine(self.model, config, batch, process)
        self.coordinator = Coordinator(config, Recorder())
        self.coordinator.attach(self.engine)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self) -> None:
        outcome = self.engine.forward_backward(self.sequences(len(self.losses)))
        self.losses.append(outcome.loss)
        self.norms.append(self.engine.update(outcome, 1e-3))

    def sequences(self, step: int) -> Tensor:
        data = torch.randint(VOCABULARY, (SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        share = SEQUENCES // self.process.ranks
        return data[self.process.rank * share : (self.process.rank + 1) * share]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in _weights_by_global_name(self.model).items()}


def _relocated(axes: tuple[int, int, int], variants: list[list[str]], relocate: bool) -> list[Story]:
    stories = []
    for words in variants:
        training = Training(axes, words)
        training.step()
        training.step()
        blocks = BLOCKS[axes[1]] if relocate else [p.block_of_cluster for p in training.model.context.placements]
        crossed = training.coordinator.executor.relocate(blocks)
        for _ in range(3):
            training.step()
        stories.append(Story(training.losses, training.norms, training.weights(), crossed, [], 0.0))
    return stories


STAGES = [[f"world.zero_stage={stage}"] for stage in (0, 1, 2)]
RELOCATIONS = [*STAGES, ["moe.top_clusters=2"], ["train.precision=bfloat16"], ["model.activation_checkpointing=true"]]
RELOCATIONS += [
    ["optimizer.kind=muon", "world.zero_stage=1"],
    ["optimizer.kind=muon", "world.zero_stage=0", "train.precision=bfloat16"],
    ["precision.residuals=packed"],
    ["precision.residuals=packed", "train.precision=bfloat16", "world.zero_stage=2"],
]


@pytest.mark.parametrize("axes", [(1, 2, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)], ids=str)
def test_where_clusters_live_changes_no_bit_of_what_follows(axes: tuple[int, int, int]) -> None:
    ranks = axes[0] * axes[1] * axes[2]
    stayed, moved = (run_ranks(_relocated, ranks, axes, RELOCATIONS, go, timeout=180) for go in (False, True))
    for number, words in enumerate(RELOCATIONS):
        assert stayed[0][number].bytes == 0, "what changes nothing sends no byte"
        assert moved[0][number].bytes > 0
        everywhere: list[dict[str, Tensor]] = [{}, {}]
        for rank in range(ranks):
            still, gone = stayed[rank][number], moved[rank][number]
            assert gone.losses == still.losses, f"{words}, rank {rank}"
            assert gone.norms == still.norms, f"{words}, rank {rank}"
            everywhere[0] |= still.weights
            everywhere[1] |= gone.weights
        assert everywhere[0].keys() == everywhere[1].keys()
        for name, value in everywhere[0].items():
            assert torch.equal(value, everywhere[1][name]), f"{words}: {name}"


def _exchanged(axes: tuple[int, int, int], variants: list[list[str]]) -> list[Story]:
    stories = []
    for words in variants:
        training = Training(axes, words)
        training.step()
        training.step()
        moved, crossed, increase = training.coordinator.executor.exchange(MOVES, training.sequences(1))
        for _ in range(3):
            training.step()
        stories.append(Story(training.losses, training.norms, training.weights(), crossed, moved, increase))
    return stories


EXCHANGES = [*STAGES, ["moe.top_clusters=2"], ["moe.expert_vectors=false"]]


@pytest.mark.parametrize("axes", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)], ids=str)
def test_any_layout_exchanges_experts_like_one_rank(axes: tuple[int, int, int]) -> None:
    (alone,) = run_ranks(_exchanged, 1, (1, 1, 1), EXCHANGES, timeout=180)
    outcomes = run_ranks(_exchanged, 4, axes, EXCHANGES, timeout=180)
    for number, (words, expected) in enumerate(zip(EXCHANGES, alone, strict=True)):
        assert expected.bytes == 0
        names: set[str] = set()
        for rank in range(4):
            story, where = outcomes[rank][number], f"{words}, rank {rank}"
            assert story.moved == MOVES
            assert (story.bytes > 0) is (axes[1] > 1 or axes[2] > 1)
            assert story.losses == pytest.approx(expected.losses, rel=1e-5), where
            assert story.norms == pytest.approx(expected.norms, rel=1e-4), where
            assert story.increase == pytest.approx(expected.increase, abs=1e-5), where
            names |= set(story.weights)
            for name, value in story.weights.items():
                close = torch.allclose(value, expected.weights[name], rtol=1e-5, atol=1e-5)
                assert close, f"{where}: {name} is off by {float((value - expected.weights[name]).abs().max())}"
        assert names == set(expected.weights)


State = dict[tuple[int, int, str, str], Tensor]


def _state_by_expert(training: Training) -> State:
    """All that is known of each expert on this rank, under its number: NaN where another replica owns it."""
    found = {}
    tensors = training.coordinator.executor.tensors
    placements, at = training.model.context.placements, training.model.context.mesh.at
    for cell in tensors.holdings.residual_runs:
        owned, first = tensors.owned(cell)
        placement, width = placements[cell.layer], tensors.holdings.residual_width[cell.name]
        cluster = placement.clusters_of_block(at.cluster)[cell.local]
        whole = torch.full((width * placement.slots_per_shard,), float("nan"))
        whole[first : first + len(owned)] = owned.float()
        for expert, values in zip(placement.experts_of(cluster, at.shard), whole.view(-1, width), strict=True):
            found[cell.layer, expert, cell.name, cell.kind.value] = values.clone()
    return found


def _states_around_an_exchange(axes: tuple[int, int, int], variants: list[list[str]]) -> list[tuple[State, State]]:
    states = []
    for words in variants:
        training = Training(axes, words)
        training.step()
        training.step()
        before = _state_by_expert(training)
        training.coordinator.executor.exchange(MOVES, training.sequences(1))
        states.append((before, _state_by_expert(training)))
    return states


@pytest.mark.parametrize("axes", [(1, 4, 1), (2, 2, 1)], ids=str)
def test_an_expert_arrives_with_every_bit_it_had(axes: tuple[int, int, int]) -> None:
    variants = [[*stage, f"train.precision={p}"] for stage in STAGES for p in ("float32", "bfloat16")]
    outcomes = run_ranks(_states_around_an_exchange, 4, axes, variants, timeout=180)
    for number, words in enumerate(variants):
        held: list[State] = [{}, {}]
        for rank in range(4):
            for whole, part in zip(held, outcomes[rank][number], strict=True):
                for key, values in part.items():
                    other = whole.setdefault(key, values)
                    overlap = ~(other.isnan() | values.isnan())
                    assert torch.equal(other[overlap], values[overlap]), f"{words}: replicas differ in {key}"
                    whole[key] = torch.where(other.isnan(), values, other)
        assert held[0].keys() == held[1].keys()
        assert {key[1] for key in held[0]} == set(range(16)), "no expert is lost"
        for key, values in held[0].items():
            assert not values.isnan().any(), f"{words}: nobody owns part of {key}"
            assert torch.equal(values, held[1][key]), f"{words}: {key}"


def _with_a_damaged_message() -> str:
    training = Training((1, 2, 1), [])
    training.step()
    before, placements = training.weights(), list(training.model.context.placements)
    real = transfer._exchange

    def damage(outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        real(outgoing, incoming)
        if dist.get_rank() == 1:
            incoming[0][5] ^= 1

    with mock.patch.object(transfer, "_exchange", damage):
        try:
            training.coordinator.executor.exchange(MOVES, training.sequences(1))
        except MoeDistError as error:
            message = str(error)
    assert training.model.context.placements == placements
    assert all(torch.equal(value, before[name]) for name, value in training.weights().items())
    training.step()
    return message


def test_what_arrives_damaged_changes_nothing_on_any_rank() -> None:
    for message in run_ranks(_with_a_damaged_message, 2):
        assert "rank 0 sent to rank 1 arrived damaged" in message


def _with_a_strict_guard() -> tuple[list[Move], list[float], list[float]]:
    stories = []
    for strict in (False, True):
        training = Training((1, 2, 1), ["recluster.max_loss_increase=0"])
        training.step()
        before = training.weights()
        if strict:
            losses = iter([1.0, *[2.0] * 50])  # before, then with whatever is tried
            with mock.patch.object(training.coordinator.executor, "_loss_of", lambda _, losses=losses: next(losses)):
                moved, _, _ = training.coordinator.executor.exchange(MOVES, training.sequences(1))
            assert all(torch.equal(value, before[name]) for name, value in training.weights().items())
        training.step()
        training.step()
        stories.append(training.losses)
    return moved, stories[0], stories[1]


def test_moves_that_would_harm_leave_no_trace() -> None:
    for moved, untouched, guarded in run_ranks(_with_a_strict_guard, 2):
        assert moved == []
        assert guarded == untouched


def _disagreeing(what: str) -> str:
    training = Training((1, 2, 1), [])
    placements = list(training.model.context.placements)
    step = 7
    if what == "placement" and dist.get_rank() == 1:
        placements[0] = placements[0].with_members(placements[0].members)
    if what == "step" and dist.get_rank() == 1:
        step = 8
    try:
        broadcast_plan(ReclusterPlan.nothing(placements), placements, step, training.process.device)
    except MoeDistError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize("what", ["placement", "step", "nothing"])
def test_ranks_that_disagree_say_so_before_anything_moves(what: str) -> None:
    for message in run_ranks(_disagreeing, 2, what):
        assert ("rank 1 disagrees" in message) is (what != "nothing")


def _largest_exchange(axes: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes that a rank sends and receives at once while all clusters change their ranks, and that a cluster has."""
    training = Training(axes, ["world.zero_stage=0"])
    training.step()
    real, largest = transfer._exchange, [0]

    def measure(outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        largest.append(sum(len(message) for message in [*outgoing.values(), *incoming.values()]))
        real(outgoing, incoming)

    blocks = [tuple(reversed(p.block_of_cluster)) for p in training.model.context.placements]
    with mock.patch.object(transfer, "_exchange", measure):
        training.coordinator.executor.relocate(blocks)
    assert [p.block_of_cluster for p in training.model.context.placements] == blocks
    weight_and_moments = 3 * 4
    cluster = training.model.clustered_layers()[0].clusters[0]
    return max(largest), weight_and_moments * sum(parameter.numel() for parameter in cluster.parameters())


@pytest.mark.parametrize("axes", [(1, 2, 1), (1, 4, 1)], ids=str)
def test_relocations_hold_one_cluster_that_comes_and_one_that_goes(axes: tuple[int, int, int]) -> None:
    for largest, cluster in run_ranks(_largest_exchange, axes[1], axes):
        assert cluster < largest <= 2 * (cluster + transfer.CHECKSUM_BYTES)
