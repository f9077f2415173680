"""Which bench a rank of `launcher/bench.py` takes part in."""

import json
from collections.abc import Callable
from typing import Any

from moe_dist.benchmarks.layer.on_ranks import bench_ranks
from moe_dist.benchmarks.layer.spec import RanksBenchSpec
from moe_dist.benchmarks.step.bench import bench_step
from moe_dist.benchmarks.step.spec import StepBenchSpec
from moe_dist.config import RunConfig

BENCHES: dict[str, Callable[[RunConfig, dict[str, Any]], None]] = {
    "layer": lambda config, words: bench_ranks(config, RanksBenchSpec.from_words(words)),
    "step": lambda config, words: bench_step(config, StepBenchSpec.from_words(words)),
}


def run_bench(name: str, spec: str, config: RunConfig) -> None:
    """Takes part in the bench of that name, with its specification as JSON; collective."""
    BENCHES[name](config, json.loads(spec))
