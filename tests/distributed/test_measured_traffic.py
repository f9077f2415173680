"""`moe-dist measure traffic` on ranks: its figures against the account of a timer from outside, and what it leaves."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_dist.benchmarks.collective_timer import CollectiveTimer, StepPhase, timing_collectives
from moe_dist.benchmarks.traffic.measure import measure_traffic
from moe_dist.benchmarks.traffic.spec import TrafficSpec
from moe_dist.config import WorldShape, load_config
from moe_dist.launch.options import from_json, to_json
from moe_dist.report import page, read_runs
from tests.distributed.ranks import run_ranks
from tests.distributed.test_traffic import HIDDEN, TOKENS, TWO_CLUSTERS, layer_of

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"


def _measure(words: list[str], spec: TrafficSpec) -> None:
    measure_traffic(load_config(SMOKE, words), spec)


def test_figures_trace_and_report(tmp_path: Path) -> None:
    words = [
        f"runs_dir={tmp_path}/runs",
        f"corpus.cache_dir={tmp_path}/cache",
        "world.shard=2",
        "world.shard_mode=experts",
    ]
    spec = TrafficSpec(steps=2, warmup=1, profile=True, json_file=f"{tmp_path}/figures.json")
    run_ranks(_measure, 4, words, spec)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["clustered", "standard"]
    for kind, found in figures.items():
        _assert_sound(found)
        folder = tmp_path / "runs" / f"smoke-traffic-{kind}"
        assert json.loads((folder / "traffic.json").read_text()) == found
        events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
        assert any(event.get("name") == "moe-dist all_to_all" for event in events)
    clustered, standard = figures["clustered"], figures["standard"]
    assert list(clustered["stages"]) == ["one", "two"]
    with np.load(tmp_path / "runs" / "smoke-traffic-standard" / "routing.npz") as routing:
        assert routing["layer1.flat"].shape == (2 * 16 // 4 * 32, 2)  # all rows of rank 0 in two steps, k = 2
        assert routing["layer1.flat"].max() < 16
    assert standard["lower_bound"]["bytes"] < standard["bytes"]
    assert clustered["lower_bound"]["bytes"] == clustered["bytes_by"]["payload"]["hidden"]
    runs = read_runs(sorted((tmp_path / "runs").iterdir()))
    assert not any(run.problems for run in runs)
    assert "Time of a step" in page.page(runs)


def _assert_sound(found: dict[str, Any]) -> None:
    assert found["tokens"] == 2 * 16 * 32
    for parts in found["bytes_by"].values():
        assert sum(parts.values()) == found["bytes"] == sum(found["bytes_by_layer"])
    assert sum(np.sum(stage["bytes"]) for stage in found["stages"].values()) == found["bytes"]
    assert sum(np.sum(stage["messages"]) for stage in found["stages"].values()) == 2 * found["messages_per_step"]
    assert 0 < found["lower_bound"]["bytes"] <= found["bytes"]
    assert found["bytes_per_token_layer"] == pytest.approx(found["bytes"] / found["tokens"] / 2)
    assert len(found["profile"]["ranks"]) == 4
    for rank in found["profile"]["ranks"]:
        assert set(rank) == set(map(str, StepPhase))
        assert all(seconds > 0 for seconds in rank.values())


def test_the_peers_own_layers_are_counted_from_outside(tmp_path: Path) -> None:
    words = [f"runs_dir={tmp_path}/runs", f"corpus.cache_dir={tmp_path}/cache"]
    spec = TrafficSpec(
        kinds=("clustered", "deepspeed", "megatron"), steps=2, warmup=1, json_file=f"{tmp_path}/figures.json"
    )
    run_ranks(_measure, 2, words, spec)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["clustered", "deepspeed", "megatron"]
    for name in ("deepspeed", "megatron"):
        found = figures[name]
        assert found["tokens"] == 2 * 16 * 32
        assert np.sum(found["stages"][name]["bytes"]) == found["bytes"] == found["bytes_by"]["link"]["intra_node"]
        assert np.trace(found["stages"][name]["bytes"]) == 0
    even = 2 * 0.5 * 4 * 32 * 4  # k copies, half of them to the other rank, four ways, 32 numbers in float32
    assert figures["deepspeed"]["bytes_per_token_layer"] > even  # it pads to the fullest expert
    megatron = figures["megatron"]["bytes_per_token_layer"]
    assert megatron == pytest.approx(even, rel=0.25)  # an untrained gate's loads are not even


def _watched_layer() -> tuple[int, int, int, int]:
    """All-to-all bytes and messages of a layer's two passes, by the timer and by the ledger."""
    layer = layer_of(TWO_CLUSTERS, WorldShape(1, 2, 1), nodes=(0, 1))
    with timing_collectives() as timer:
        timer.active = True
        layer(torch.randn(TOKENS, HIDDEN, requires_grad=True)).square().sum().backward()
    sent = layer.context.ledger.total()  # type: ignore[union-attr, operator]
    return sum(timer.bytes_to.values()), sum(timer.messages_to.values()), sent.bytes, sent.messages


def test_the_watch_sees_what_the_ledger_counts() -> None:
    for watched_bytes, watched_messages, sent_bytes, sent_messages in run_ranks(_watched_layer, 2):
        assert watched_bytes == sent_bytes > 0
        assert watched_messages == sent_messages > 0


def _collectives() -> tuple[dict[str, float], float, bool]:
    before = dist.all_reduce
    with timing_collectives() as timer:
        quiet = torch.ones(3)
        dist.all_reduce(quiet)
        assert not timer.seconds
        timer.active = True
        value = torch.ones(3)
        work = dist.all_reduce(value, async_op=True)
        work.wait()
        gathered = [torch.empty(3) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, torch.full((3,), float(dist.get_rank())))
        seconds = {part.value: time for part, time in timer.seconds.items()}
    return seconds, float(value[0]), dist.all_reduce is before


def test_watched_collectives_do_what_they_did() -> None:
    for seconds, value, restored in run_ranks(_collectives, 2):
        assert set(seconds) == {"reduction", "waiting"}
        assert value == 2
        assert restored


def test_options_survive_their_way_to_the_ranks() -> None:
    spec = TrafficSpec(("clustered", "dense"), 5, 1, True, "/a file.json")
    assert from_json(TrafficSpec, to_json(spec)) == spec


def test_another_kind_is_validated() -> None:
    config = load_config(SMOKE)
    assert TrafficSpec().config_for(config, "standard").moe.kind == "standard"
    assert TrafficSpec().config_for(config, "dense").train.warmup_steps == 0


def test_the_watch_is_idle_until_asked() -> None:
    timer = CollectiveTimer()
    assert timer.wrap(StepPhase.REDUCTION, lambda x: x + 1)(1) == 2
