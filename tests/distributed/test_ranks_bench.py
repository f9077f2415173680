"""`moe-dist bench layer --ranks`: bytes against the floor, the peers' layers, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.benchmarks.baselines.megatron_moe import MegatronMoE, stand_ins
from moe_dist.benchmarks.layer.contenders import latent_width
from moe_dist.benchmarks.layer.on_ranks import bench_ranks
from moe_dist.benchmarks.layer.recorded_routing import RoutingRecord
from moe_dist.benchmarks.layer.spec import LATENT, LIBRARIES, PEERS, LayerShape, RanksBenchSpec, overlapped
from moe_dist.benchmarks.rounds import inputs
from moe_dist.config import RunConfig, WorldConfig
from moe_dist.dispatch.chunked_overlap import ExchangeSpeed, choose_chunks
from moe_dist.distributed.init import init_distributed
from moe_dist.errors import ConfigError
from moe_dist.launch.options import from_json, to_json
from tests.distributed.ranks import run_ranks

SMALL = LayerShape(tokens=96, hidden=32, expert_hidden=48, experts=8, clusters=4, rank=2)
SPEC = RanksBenchSpec(SMALL, top_k=(2,), peers=PEERS, overlap=("auto", "2"), repeats=1)
COUNTS = 2 * 2 * 8 / (2 * 96)  # bytes a token: each of 2 ranks tells the other of 2 clusters' rows by an int64


def _bench(spec: RanksBenchSpec) -> None:
    bench_ranks(RunConfig(), spec)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    run_ranks(_bench, 2, replace(SPEC, json_file=str(file)))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_contender_is_measured(figures: dict[str, Any]) -> None:
    (case,) = figures["cases"]
    ours = {"clustered m=1", "clustered m=2", *map(overlapped, ("auto", "2"))}
    assert set(case["seconds"]) == {"dense", *ours, "standard", *PEERS}
    assert set(case["peer_over_clustered"]) == ours
    assert all(spread["median"] > 0 for spread in case["seconds"].values())
    assert case["over_dense"]["dense"]["median"] == 1
    assert case["fastest_peer"] in LIBRARIES, "LatentMoE is another layer"
    assert case["hops"][overlapped("2")] == {"chunks": 2, "speed": None}
    assert (
        choose_chunks(ExchangeSpeed(**case["hops"][overlapped("auto")]["speed"]))
        == case["hops"][overlapped("auto")]["chunks"]
    )
    assert figures["ranks"] == 2


def test_bytes_are_the_floor_and_the_counts(figures: dict[str, Any]) -> None:
    sent = figures["cases"][0]["bytes_per_token"]
    one = sent["clustered m=1"]
    assert one["floor"] > 0
    assert one["counted"] == pytest.approx(one["floor"] + COUNTS, abs=1e-9)
    assert sent["clustered m=2"]["counted"] > sent["clustered m=2"]["floor"] > one["floor"]  # routing travels along
    for name in map(overlapped, ("auto", "2")):
        assert sent[name] == one
    assert sent["dense"] == {"counted": 0, "floor": 0}
    k_copies = 4 * 2 * 0.5 * 32 * 4  # there and back in both passes, k = 2, half of them to the other rank, float32
    for peer in PEERS:
        assert sent[peer]["floor"] is None
        assert sent[peer]["counted"] == pytest.approx(k_copies * (16 / 32 if peer == LATENT else 1), rel=0.4)


def test_latent_width_by_hand() -> None:
    """Experts of 8 x 3 x 16 x 48 and projections of 2 x 32 x 16; clustered: bases of 4 x 3 x 32 x 48, 8 residuals."""
    clustered = SMALL.config("clustered", "float32", 2)
    held = 4 * 3 * 32 * 48 + 8 * 2 * 3 * (32 + 48)
    assert 16 * (8 * 3 * 48 + 2 * 32) <= held < 24 * (8 * 3 * 48 + 2 * 32)
    assert latent_width(clustered) == 16


def test_recorded_choices_of_local_experts_send_nothing(tmp_path: Path) -> None:
    """Tokens of each rank choose two of its own four experts: of the layers that replay it none sends a vector."""
    own = [[4 * rank + token % 3, 4 * rank + 3] for rank in (0, 1) for token in range(SMALL.tokens)]
    facts: dict[str, str | int] = {"kind": "standard", "experts": 8, "clusters": 4, "top_clusters": 1, "top_k": 2}
    RoutingRecord(facts, np.array(own)).write(tmp_path / "own.npz")
    file = tmp_path / "figures.json"
    spec = replace(SPEC, overlap=(), routing=(str(tmp_path / "own.npz"),), json_file=str(file))
    run_ranks(_bench, 2, spec)
    (case,) = json.loads(file.read_text())["cases"]
    assert set(case["replayed"]) == {"standard", *PEERS}
    sent = {name: volume["counted"] for name, volume in case["bytes_per_token"].items()}
    assert sent["standard"] == COUNTS * 2  # counts of four experts instead of two clusters
    assert sent["megatron"] <= 2 * 8 * 8 / SMALL.tokens  # counts alone
    assert sent["deepspeed"] == pytest.approx(4 * 2 * 0.5 * 32 * 4, rel=0.4), "it pads each expert to its capacity"
    assert sent["clustered m=1"] > 32 * 4, "not of its kind of choice"


def _megatron_against_experts(latent: int | None) -> None:
    """Megatron-core's layer behind the stand-ins computes what its own router, projections and experts say."""
    process = init_distributed(WorldConfig())
    config = SMALL.config("standard", "float32", 2)
    layer = MegatronMoE(config, process.ranks, latent)
    x_TD, d_y_TD = inputs(16, SMALL.hidden, "float32", process, 0)
    with stand_ins():
        y_TD = layer(x_TD)
        y_TD.backward(d_y_TD)
        probability_TE, chosen_TE = layer.layer.router(x_TD[:, None])
        experts = _all_experts(layer, process.ranks)
    module = layer.layer
    x_TL = x_TD if latent is None else x_TD @ module.fc1_latent_proj.weight.T
    expected_TD = torch.zeros_like(x_TL)
    for e, (w_in, w_out) in enumerate(experts):
        gate, up = (x_TL @ w_in.T).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up @ w_out.T
        expected_TD = expected_TD + (probability_TE * chosen_TE)[:, e, None] * h
    if latent is not None:
        assert x_TL.shape == (16, latent)
        expected_TD = expected_TD @ module.fc2_latent_proj.weight.T
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-5)
    assert x_TD.grad is not None
    assert torch.cuda.current_device.__module__ == "torch.cuda"  # put back


def _all_experts(layer: MegatronMoE, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = []
    for expert in layer.layer.experts.local_experts:
        pairs += [expert.linear_fc1.weight.detach(), expert.linear_fc2.weight.detach()]
    gathered = []
    for weight in pairs:
        copies = [torch.empty_like(weight) for _ in range(ranks)]
        torch.distributed.all_gather(copies, weight)
        gathered.append(copies)
    return [
        (gathered[2 * e][rank], gathered[2 * e + 1][rank]) for rank in range(ranks) for e in range(len(gathered) // 2)
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for machines without CUDA")
@pytest.mark.parametrize("latent", [None, 16])
def test_megatron_computes_what_it_should(latent: int | None) -> None:
    run_ranks(_megatron_against_experts, 2, latent)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"peers": ("tutel",)}, "peer 'tutel' is unknown: use deepspeed or megatron"),
        ({"dtypes": ("int8",)}, "dtype 'int8' is unknown"),
        ({"overlap": ("1",)}, "overlap=1 must be auto, or a number of chunks from 2 to 64"),
        ({"repeats": 0}, "repeats=0 must be 1 or more"),
        ({"shape": replace(SMALL, tokens=0)}, "tokens=0 must be 1 or more"),
        ({"shape": replace(SMALL, experts=6, clusters=2)}, "experts=6 cannot be divided over 4 ranks"),
        ({"shape": replace(SMALL, clusters=2)}, "clusters=2 cannot be divided over 4 ranks"),
        ({"top_k": (3,)}, "moe.top_k=3 is larger than a cluster"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("[", r"\[")):
        replace(SPEC, **change).check(4)


def test_a_specification_survives_its_way_to_the_ranks(tmp_path: Path) -> None:
    spec = replace(SPEC, json_file=str(tmp_path / "a file.json"))
    assert from_json(RanksBenchSpec, to_json(spec)) == spec
