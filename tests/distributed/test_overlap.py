"""Chunks in turn against one chunk, their reference: values, gradients, loads, bytes, and the order of things."""

import re
from collections import Counter
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.config import MoEConfig, WorldShape, load_config
from moe_dist.dispatch.all_to_all import AllToAll, PendingAllToAll
from moe_dist.dispatch.chunked_overlap import ExchangeSpeed, choose_chunks
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError
from moe_dist.metrics.recorder import Recorder
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.training.overlap_choice import OverlapChoice
from tests.distributed.ranks import run_ranks
from tests.distributed.test_traffic import HIDDEN, layer_of

ONE = MoEConfig(experts=16, clusters=8, top_k=2, expert_hidden=16, rank=2, wire_dtype="float32", z_loss_weight=0.1)
TWO = ONE.model_copy(update={"top_clusters": 2})
EIGHT_BITS = ONE.model_copy(update={"wire_dtype": "int8"})
CHUNKS = (2, 3, 8)
TINY = [
    "model.hidden_size=32", "model.heads=2", "model.sequence_length=16", "moe.experts=16", "moe.clusters=4",
    "moe.expert_hidden=16", "moe.rank=2",
]  # fmt: skip
TOKENS = [[33, 40, 27, 50], [0, 41, 3, 1], [2, 1, 0, 0]]
"""Of each rank: ragged; one rank without any; fewer than there are chunks."""
Outcome = tuple[Tensor, list[Tensor], Tensor, Counter[Any]]


def _run(layer: ClusteredMoE, tokens: int, chunks: int) -> Outcome:
    """Output, gradients of input and weights, loads of experts, and bytes by what and to whom."""
    layer.set_chunks(chunks)
    layer.zero_grad(set_to_none=True)
    layer.balance.clear_counts()
    layer.context.ledger.clear()
    draw = torch.Generator().manual_seed(tokens * 10 + dist.get_rank())
    x_TD = torch.randn(tokens, HIDDEN, generator=draw, requires_grad=True)
    y_TD = layer(x_TD)
    y_TD.backward(torch.randn(tokens, HIDDEN, generator=draw))
    weights = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]
    assert x_TD.grad is not None
    sent = Counter({key: volume.bytes for key, volume in layer.context.ledger.sent.items()})
    return y_TD.detach(), [x_TD.grad, *weights], layer.balance.count_LE.clone(), sent


def _chunks_against_one(moe: MoEConfig, shape: WorldShape) -> None:
    layer = layer_of(moe, shape, nodes=(0,) * shape.ranks)
    assert isinstance(layer, ClusteredMoE)
    _enlarge(layer)
    for tokens, bias in ((TOKENS[0], 0.0), (TOKENS[1], 0.0), (TOKENS[2], 0.0), (TOKENS[0], 1e3)):
        layer.balance.cluster_bias_LG[0, 1] = bias  # in the last case one cluster has all tokens, others none
        y_TD, gradients, loads, sent = _run(layer, tokens[dist.get_rank()], 1)
        for chunks in CHUNKS:
            other_TD, others, other_loads, other_sent = _run(layer, tokens[dist.get_rank()], chunks)
            off = 1 / 100 if moe.wire_dtype == "int8" else 1e-5  # a step of eight bits may round the other way
            for one, other in zip([y_TD, *gradients], [other_TD, *others], strict=True):
                torch.testing.assert_close(other, one, rtol=0, atol=off * max(1e-3, float(one.norm())))
            assert torch.equal(other_loads, loads)
            if moe.top_clusters == 1 and shape.shard == 1:
                assert other_sent == sent
            else:  # counts of stage two are sent for each chunk
                assert _without_counts(other_sent) == _without_counts(sent)


def _enlarge(layer: nn.Module) -> None:
    """Weights that make every part of the formula show; the same on all ranks that share them."""
    for number, parameter in enumerate(layer.parameters()):
        draw = torch.Generator().manual_seed(number)
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3


def _without_counts(sent: Counter[Any]) -> Counter[Any]:
    return Counter({key: size for key, size in sent.items() if key.payload != "counts"})


@pytest.mark.parametrize(
    ("moe", "axes"),
    [
        (ONE, (1, 2, 1)),
        (ONE, (1, 4, 1)),
        (TWO, (1, 4, 1)),
        (TWO, (1, 2, 2)),
        (EIGHT_BITS, (1, 2, 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else f"m={value.top_clusters} {value.wire_dtype}",
)
def test_chunks_are_one_chunk_divided(moe: MoEConfig, axes: tuple[int, int, int]) -> None:
    shape = WorldShape(*axes)
    run_ranks(_chunks_against_one, shape.ranks, moe, shape)


def _events(chunks: int) -> tuple[list[str], list[str]]:
    """What begins, ends and is computed on this rank, in order, forward and backward."""
    layer = layer_of(ONE, WorldShape(1, 2, 1), nodes=(0, 0))
    assert isinstance(layer, ClusteredMoE)
    layer.set_chunks(chunks)
    found: list[str] = []
    begun: dict[int, str] = {}
    begin: Any = AllToAll.launch
    finish, compute = PendingAllToAll.wait, ClusteredExperts.forward

    def telling_begin(self: AllToAll, *args: Any) -> PendingAllToAll:
        pending: PendingAllToAll = begin(self, *args)
        begun[id(pending)] = f"{sum(event.startswith('begin') for event in found)}"
        found.append(f"begin {begun[id(pending)]}")
        return pending

    def telling_finish(self: PendingAllToAll) -> Tensor:
        found.append(f"finish {begun.pop(id(self))}")
        return finish(self)

    def telling_compute(self: ClusteredExperts, x_AD: Tensor, slot_AK: Tensor, gate_AK: Tensor) -> Tensor:
        y_AD = compute(self, x_AD, slot_AK, gate_AK)
        if self is layer.clusters[0]:
            found.append("compute")
            y_AD.register_hook(lambda _: found.append("compute"))
        return y_AD

    with (
        mock.patch.object(AllToAll, "launch", telling_begin),
        mock.patch.object(PendingAllToAll, "wait", telling_finish),
        mock.patch.object(ClusteredExperts, "forward", telling_compute),
    ):
        y_TD = layer(torch.randn(64, HIDDEN, requires_grad=True))
        forward = found.copy()
        found.clear()
        y_TD.sum().backward()
    return forward, found


def test_a_chunk_is_on_the_wire_while_another_is_computed() -> None:
    one = "begin 0, finish 0, compute, begin 1, finish 1"
    three = (
        "begin 0, finish 0, begin 1, compute, begin 2, finish 1, begin 3, compute, finish 2, begin 4, finish 3, "
        "compute, finish 4, begin 5, finish 5"
    )
    for chunks, expected in ((1, one), (3, three)):
        for forward, backward in run_ranks(_events, 2, chunks):
            assert ", ".join(forward) == expected
            assert ", ".join(backward) == expected  # the same picture, run from its end


class _Events(Recorder):
    """Keeps what a run says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, dict[str, Any]]] = []

    def event(self, name: str, step: int, **fields: Any) -> None:
        self.found.append((name, step, fields))


Case = tuple[tuple[int, ...], list[str], dict[str, Any]]
"""Each rank's node, words of the configuration, and the state of an earlier choice."""
Choice = tuple[int | None, dict[str, Any], list[tuple[str, int, dict[str, Any]]], list[int]]
"""Its chunks, state and events, and the chunks of each layer."""
LAYOUT = "data 1 x cluster 2 x shard 1 on 2 node(s)"
KNOWN: list[tuple[Case, int]] = [
    (((0, 0), [], {}), 1),  # the processors that move messages are those that compute
    (((0, 1), ["moe.balance=aux_loss"], {}), 1),
    (((0, 1), [], {"chunks": 4, "layout": LAYOUT}), 4),  # an earlier choice is kept
    (((0, 0), [], {"chunks": 4, "layout": LAYOUT}), 1),  # but not that of another layout
    (((0, 1), ["moe.overlap_chunks=3"], {}), 3),
]


def _choose(cases: list[Case]) -> list[Choice]:
    """What comes of each case; nothing leaves a trace in loads, bytes and gradients."""
    choices, shape = [], WorldShape(1, 2, 1)
    for nodes, words, state in cases:
        config = load_config(None, [*TINY, *words])
        process, mesh = init_distributed(config.world), Mesh.create(shape, timedelta(seconds=60))
        links, recorder = Links(mesh.rank, nodes), _Events()
        model = LanguageModel(config, 97, mesh, links)
        choice = OverlapChoice(config, shape, links, process.device, 48, recorder)
        if state:
            choice.load_state_dict(state)
        choice._layers = model.clustered_layers()
        choice.start(3)
        assert model.context.ledger.total().bytes == 0
        assert int(model.context.balance.count_LE.sum()) == 0
        assert all(parameter.grad is None for parameter in model.parameters())
        of_layers = [layer.dispatcher.chunks for layer in model.clustered_layers()]
        choices.append((choice.chunks, choice.state_dict(), recorder.found, of_layers))
    return choices


def test_the_number_of_chunks_is_measured_between_nodes_unless_it_is_known() -> None:
    first, second = run_ranks(_choose, 2, [((0, 1), [], {}), *(case for case, _ in KNOWN)])
    assert first == second
    chunks, state, events, of_layers = first[0]
    ((name, step, fields),) = events
    assert (name, step) == ("overlap", 3)
    assert chunks == fields.pop("chunks") == choose_chunks(ExchangeSpeed(**fields))
    assert of_layers == [chunks] * 2
    assert state == {"chunks": chunks, "layout": LAYOUT}
    for (case, expected), (_, _, events, of_layers) in zip(KNOWN, first[1:], strict=True):
        assert (events, of_layers) == ([], [expected] * 2), case


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["moe.capacity_factor=1.5"], "moe.overlap_chunks=2 does not work with moe.capacity_factor=1.5"),
        (["moe.balance=aux_loss"], "moe.overlap_chunks=2 does not work with moe.balance=aux_loss"),
        (["memory.offload=true"], "moe.overlap_chunks=2 does not work with memory.offload=true"),
    ],
)
def test_what_needs_whole_batches_refuses_chunks(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        load_config(None, ["moe.overlap_chunks=2", *words])
