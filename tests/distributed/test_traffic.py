"""The ledger against the collectives themselves, and the bytes against the floor that the routing sets."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.config import ModelConfig, MoEConfig, WorldShape
from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.routing_trace import RoutingTrace
from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage, TrafficLedger
from moe_dist.dispatch.traffic_model import hop_costs, ranks_of
from moe_dist.dispatch.wire_format import Int8Format, pack, unpack
from moe_dist.distributed.links import LinkKind, Links
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.layer_kinds import LAYER_KINDS
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.standard_moe import StandardMoE
from moe_dist.moe.topk_routing import choose_flat
from moe_dist.moe.two_stage_routing import choose_clusters
from tests.distributed.ranks import run_ranks

HIDDEN, TOKENS = 32, 96
MODEL = ModelConfig(hidden_size=HIDDEN, heads=2, layers=1)


def layer_of(moe: MoEConfig, shape: WorldShape, nodes: tuple[int, ...]) -> nn.Module:
    mesh = Mesh.create(shape, timedelta(seconds=60))
    placements = [ExpertPlacement.contiguous(moe.experts, moe.clusters, shape)] if moe.kind == "clustered" else []
    balance = BalanceState.create(1, moe, torch.device("cpu"))
    context = LayerContext(mesh, placements, balance, TrafficLedger(Links(mesh.rank, nodes)), 0)
    return LAYER_KINDS[moe.kind](0, MODEL, moe, context, 1.0)


@contextmanager
def _spied() -> Iterator[Counter[tuple[int, str]]]:
    """Counts, from outside, the bytes and messages each all-to-all hands over for each other rank."""
    sent: Counter[tuple[int, str]] = Counter()
    real = dist.all_to_all_single

    def spy(output: Tensor, given: Tensor, receive: Any = None, send: Any = None, **options: Any) -> Any:
        ranks = dist.get_process_group_ranks(options["group"])
        chunks = given.split(send) if send is not None else given.chunk(len(ranks))
        for peer, chunk in zip(ranks, chunks, strict=True):
            if peer != dist.get_rank() and chunk.numel():
                sent[peer, "bytes"] += chunk.numel() * chunk.element_size()
                sent[peer, "messages"] += 1
        return real(output, given, receive, send, **options)

    with mock.patch.object(dist, "all_to_all_single", spy):
        yield sent


def _ledger_against_spy(moe: MoEConfig, shape: WorldShape) -> None:
    layer = layer_of(moe, shape, nodes=(0, 0, 1, 1)[: shape.ranks])
    ledger: TrafficLedger = layer.context.ledger  # type: ignore[union-attr, assignment]
    x_TD = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    with _spied() as sent:
        layer(x_TD).square().sum().backward()
    counted: Counter[tuple[int, str]] = Counter()
    for key, volume in ledger.sent.items():
        counted[key.peer, "bytes"] += volume.bytes
        counted[key.peer, "messages"] += volume.messages
    assert sent, "nothing crossed"
    assert counted == sent
    across = sum(size for (peer, what), size in sent.items() if what == "bytes" and peer // 2 != dist.get_rank() // 2)
    assert ledger.total(LinkKind.INTER_NODE).bytes == across
    assert ledger.total(LinkKind.SELF).bytes == 0
    before = ledger.total().bytes
    ledger.recording = False
    layer(x_TD)
    assert ledger.total().bytes == before


CLUSTERED = MoEConfig(experts=16, clusters=4, top_k=2, expert_hidden=16, rank=2)
STANDARD = MoEConfig(kind="standard", experts=16, top_k=2, expert_hidden=16)
TWO_CLUSTERS = CLUSTERED.model_copy(update={"top_clusters": 2})


@pytest.mark.parametrize(
    ("moe", "axes"),
    [
        (CLUSTERED, (1, 4, 1)),
        (CLUSTERED, (1, 2, 2)),
        (TWO_CLUSTERS, (2, 2, 1)),
        (TWO_CLUSTERS, (1, 2, 2)),
        (STANDARD, (2, 2, 1)),
        (STANDARD, (1, 4, 1)),
        (CLUSTERED.model_copy(update={"wire_dtype": "float16"}), (1, 4, 1)),
        (TWO_CLUSTERS.model_copy(update={"wire_dtype": "int8"}), (1, 2, 2)),
        (CLUSTERED.model_copy(update={"capacity_factor": 0.5}), (1, 2, 2)),
        (TWO_CLUSTERS.model_copy(update={"capacity_factor": 0.5}), (1, 4, 1)),
        (STANDARD.model_copy(update={"capacity_factor": 0.5}), (1, 4, 1)),
    ],
    ids=str,
)
def test_every_byte_and_message_is_counted(moe: MoEConfig, axes: tuple[int, int, int]) -> None:
    run_ranks(_ledger_against_spy, 4, moe, WorldShape(*axes))


def _formulas_against_ledger(moe: MoEConfig, shape: WorldShape) -> None:
    """Every rank compares what it has sent with what the formulas make of the rows that its routing moved."""
    nodes = (0, 0, 1, 1)[: shape.ranks]
    layer = layer_of(moe, shape, nodes)
    context: LayerContext = layer.context  # type: ignore[assignment]
    observed = RoutingTrace(dist.get_rank(), nodes, keep=TOKENS)
    context.ledger.observer = observed
    torch.manual_seed(dist.get_rank())
    layer(torch.randn(TOKENS, HIDDEN, requires_grad=True)).square().sum().backward()
    expected_hops = hop_costs(MODEL, moe, shape)
    assert {key.stage for key in context.ledger.sent} == {hop.stage for hop in expected_hops}
    for hop in expected_hops:
        needs = observed.needs[0, hop.stage]
        rows_RP = [torch.zeros(ranks_of(hop.stage, shape), dtype=torch.int64) for _ in range(shape.ranks)]
        dist.all_gather(rows_RP, needs.moved_P)
        rows_PP = torch.stack([rows_RP[rank] for rank in needs.group]).double().numpy()
        me = needs.group.index(dist.get_rank())
        for (payload, direction), bytes_PP in hop.volumes(rows_PP).items():
            sent = {
                k.peer: v.bytes for k, v in context.ledger.sent.items() if k[1:4] == (hop.stage, payload, direction)
            }
            expected = {peer: size for peer, size in zip(needs.group, bytes_PP[me].tolist(), strict=True) if size}
            assert sent == expected, f"{hop}, {payload}, {direction}"
        assert len(observed.choices[0, hop.stage][0]) > 0


@pytest.mark.parametrize(
    ("moe", "axes"),
    [
        (CLUSTERED, (1, 4, 1)),
        (CLUSTERED, (1, 2, 2)),
        (CLUSTERED, (1, 1, 4)),
        (TWO_CLUSTERS, (2, 2, 1)),
        (TWO_CLUSTERS.model_copy(update={"wire_dtype": "float32"}), (1, 2, 2)),
        (CLUSTERED.model_copy(update={"wire_dtype": "int8"}), (1, 2, 2)),
        (STANDARD, (2, 2, 1)),
        (STANDARD, (1, 2, 2)),
        (CLUSTERED.model_copy(update={"capacity_factor": 0.5}), (1, 2, 2)),
        (TWO_CLUSTERS.model_copy(update={"capacity_factor": 0.5}), (1, 4, 1)),
        (STANDARD.model_copy(update={"capacity_factor": 0.5}), (1, 4, 1)),
    ],
    ids=str,
)
def test_the_formulas_give_what_the_ledger_counts(moe: MoEConfig, axes: tuple[int, int, int]) -> None:
    run_ranks(_formulas_against_ledger, 4, moe, WorldShape(*axes))


def _hidden_bytes(moe: MoEConfig, shape: WorldShape) -> tuple[dict[str, int], int]:
    """Bytes of hidden vectors sent over stage one, and the copies that this rank's tokens need at the least."""
    layer = layer_of(moe, shape, nodes=(0,) * shape.ranks)
    context: LayerContext = layer.context  # type: ignore[assignment]
    torch.manual_seed(dist.get_rank())
    x_TD = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    layer(x_TD).sum().backward()
    group = context.mesh.group(GroupKind.EXPERT_PARALLEL if moe.kind == "standard" else GroupKind.STAGE_ONE)
    remote = _copies(layer, x_TD, moe, group.size) != group.ranks.index(context.mesh.rank)
    sent = {
        way.value: sum(
            volume.bytes
            for key, volume in context.ledger.sent.items()
            if key.payload is Payload.HIDDEN and key.direction is way and key.stage is not Stage.TWO
        )
        for way in Direction
    }
    return sent, int(remote.sum())


def _copies(layer: nn.Module, x_TD: Tensor, moe: MoEConfig, ranks: int) -> Tensor:
    """Destination of each copy: the distinct ranks of a token's clusters, or the rank of each chosen expert."""
    if isinstance(layer, StandardMoE):
        logits_TE = layer.router.logits(x_TD)
        return choose_flat(logits_TE, torch.zeros(moe.experts), moe.top_k).expert_TK.flatten() // (moe.experts // ranks)
    assert isinstance(layer, ClusteredMoE)
    logits_TG = layer.router.cluster_logits(x_TD, torch.tensor(layer.placement.members))
    blocks_TM = choose_clusters(logits_TG, torch.zeros(moe.clusters), moe.top_clusters) // (moe.clusters // ranks)
    return torch.tensor([block for row in blocks_TM.tolist() for block in set(row)])


@pytest.mark.parametrize("moe", [CLUSTERED, TWO_CLUSTERS, STANDARD], ids=str)
@pytest.mark.parametrize("axes", [(1, 4, 1), (2, 2, 1)], ids=str)
def test_hidden_bytes_are_one_copy_a_destination_each_way(moe: MoEConfig, axes: tuple[int, int, int]) -> None:
    outcomes = run_ranks(_hidden_bytes, 4, moe, WorldShape(*axes))
    copies = sum(copies for _, copies in outcomes)
    one_way = copies * HIDDEN * torch.bfloat16.itemsize  # wire_dtype's default
    assert copies > 0
    for way in Direction:  # there and back, in each pass
        assert sum(sent[way.value] for sent, _ in outcomes) == 2 * one_way


def _eight_bits_both_ways() -> tuple[Tensor, Tensor, int]:
    """What arrives of a vector sent to the other rank, what comes back of its gradient, and the bytes of both."""
    rank = dist.get_rank()
    mesh = Mesh.create(WorldShape(1, 2, 1), timedelta(seconds=60))
    ledger = TrafficLedger(Links(rank, (0, 0)))
    channel = AllToAll(mesh.group(GroupKind.STAGE_ONE), ledger, 0, Stage.ONE, Int8Format())
    x_RD = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    send, receive = ([1, 2], [1, 2]) if rank == 0 else ([2, 1], [2, 1])
    y_RD = channel.exchange(x_RD, send, receive, Payload.HIDDEN)
    y_RD.backward(x_RD.detach().flip(0))
    assert x_RD.grad is not None
    return y_RD.detach(), x_RD.grad, channel.ledger.total(payload=Payload.HIDDEN).bytes


def test_eight_bits_round_vectors_and_gradients_on_their_way() -> None:
    x_RD = [torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    rounded = [unpack(pack(x), torch.float32) for x in x_RD]
    (y_0, grad_0, bytes_0), (y_1, grad_1, bytes_1) = run_ranks(_eight_bits_both_ways, 2)
    assert torch.equal(y_0, torch.cat([rounded[0][:1], rounded[1][:2]]))
    assert torch.equal(y_1, torch.cat([rounded[0][1:], rounded[1][2:]]))
    # rank r's gradient of what it received is its own x, upside down; the senders get it back rounded once
    assert torch.equal(grad_0, torch.cat([rounded[0].flip(0)[:1], rounded[1].flip(0)[:2]]))
    assert torch.equal(grad_1, torch.cat([rounded[0].flip(0)[1:], rounded[1].flip(0)[2:]]))
    assert bytes_0 == bytes_1 == 2 * 2 * (HIDDEN + 4)  # two rows to the other rank, in each pass
