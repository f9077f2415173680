"""`moe-dist bench step` on ranks: every part of a step is seen, and the speeds are those of the kinds."""

import json
from pathlib import Path

from moe_dist.benchmarks.step.bench import bench_step
from moe_dist.benchmarks.step.profiler import StepPart
from moe_dist.benchmarks.step.spec import StepBenchSpec
from moe_dist.config import load_config
from tests.distributed.ranks import run_ranks

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"


def _bench(words: list[str], spec: StepBenchSpec) -> None:
    bench_step(load_config(SMOKE, words), spec)


def test_kinds_are_compared_and_divided(tmp_path: Path) -> None:
    words = [f"runs_dir={tmp_path}/runs", f"corpus.cache_dir={tmp_path}/cache", "train.log_every=1"]
    kinds = ("megatron-moe", "clustered", "standard")
    spec = StepBenchSpec(kinds, rounds=2, steps=1, warmup=1, divided=2, json_file=f"{tmp_path}/figures.json")
    run_ranks(_bench, 2, words, spec)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert list(found["kinds"]) == ["megatron-moe", "clustered", "standard"]
    assert found["kinds"]["standard"]["over_last"]["median"] == 1
    megatron = found["kinds"].pop("megatron-moe")  # which is timed, not divided into parts
    assert megatron["tokens_per_second"]["median"] > 0
    assert megatron["parts"] == {}
    for kind, figures in found["kinds"].items():
        assert set(figures["parts"]) == set(map(str, StepPart))
        assert all(seconds > 0 for seconds in figures["parts"].values()), figures["parts"]
        assert figures["tokens_per_second"]["median"] > 0
        assert 0 < found["overhead"][kind] < 1
    assert not (tmp_path / "runs").exists()  # it trains, but is no run
