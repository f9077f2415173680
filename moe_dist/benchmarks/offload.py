"""`moe-dist bench offload`: bytes that a step with offloaded experts moves, against the share of active clusters.

Random tokens are routed to the first few clusters of every layer only, as by a fine-tuning on one domain, with lazy
updates and without (`memory.lazy_updates`); one process, one cluster a token.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from moe_dist.benchmarks.offload_spec import OffloadBenchSpec
from moe_dist.config import RunConfig, resolve_batch, resolve_world
from moe_dist.console import titled_table
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.model.language_model import LanguageModel

VOCABULARY = 512
WARMUP = 2
SHUNNED = -1e9
"""Selection bias of a cluster that no token chooses."""


@dataclass(frozen=True)
class OffloadBenchCase:
    """Figures of one case: means over the measured steps, and the median time."""

    lazy: bool
    active: int
    bytes_per_step: float
    deferred: float
    """Share of the updates that were deferred."""
    seconds: float


def run_offload_bench(spec: OffloadBenchSpec) -> list[OffloadBenchCase]:
    """Measure all cases, in this process."""
    with TemporaryDirectory() as folder:
        configs = {lazy: spec.config(lazy, Path(folder)) for lazy in (True, False)}
        process = init_distributed(configs[True].world)
        try:
            return [_measure(config, active, spec, process) for config in configs.values() for active in spec.active]
        finally:
            shutdown()


def _measure(config: RunConfig, active: int, spec: OffloadBenchSpec, process: RankInfo) -> OffloadBenchCase:
    mesh, batch = Mesh.create(resolve_world(config, process.ranks)), resolve_batch(config, process.ranks)
    memory = ExpertMemory(config, spec.clusters, process.rank, process.device)
    try:
        links = Links.discover(process.device)
        model = LanguageModel(config, VOCABULARY, mesh, links, batch.accumulation, memory=memory)
        engine = DeepSpeedEngine(model, config, batch, process)
        model.context.balance.cluster_bias_LG[:, active:] = SHUNNED
        size = config.train.global_batch_size, config.model.sequence_length + 1
        draw, seconds, start = torch.Generator().manual_seed(config.seed), [], 0
        for step in range(WARMUP + spec.steps):
            if step == WARMUP:
                start = _moved(memory)
            started = time.perf_counter()
            outcome = engine.forward_backward(torch.randint(VOCABULARY, size, generator=draw))
            engine.update(outcome, config.optimizer.learning_rate)
            seconds.append(time.perf_counter() - started)
        optimizer = engine.training_state().offloaded
        assert optimizer is not None
        moved = (_moved(memory) - start) / spec.steps
        share = optimizer.deferred / optimizer.updates
        return OffloadBenchCase(config.memory.lazy_updates, active, moved, share, median(seconds[WARMUP:]))
    finally:
        memory.close()


def _moved(memory: ExpertMemory) -> int:
    figures = memory.tiers.figures()
    return figures["bytes_in"] + figures["bytes_out"]


def render(spec: OffloadBenchSpec, cases: list[OffloadBenchCase], console: Console) -> None:
    """Print a row for each number of active clusters."""
    table = titled_table(
        f"offloaded training, {spec.clusters} clusters a layer, budget {spec.budget:.0%} of their state"
    )
    for column in (
        "active clusters",
        "MB a step",
        "every update: MB a step",
        "deferred",
        "ms a step",
        "every update: ms",
    ):
        table.add_column(column, justify="right")
    found = {(case.lazy, case.active): case for case in cases}
    for active in spec.active:
        lazy, eager = found[True, active], found[False, active]
        table.add_row(
            f"{active} of {spec.clusters}",
            f"{lazy.bytes_per_step / 1e6:,.1f}",
            f"{eager.bytes_per_step / 1e6:,.1f}",
            f"{lazy.deferred:.1%}",
            f"{1e3 * lazy.seconds:,.0f}",
            f"{1e3 * eager.seconds:,.0f}",
        )
    console.print(table)


def to_dict(spec: OffloadBenchSpec, cases: list[OffloadBenchCase]) -> dict[str, Any]:
    """Return the figures for `--json`."""
    return {"spec": asdict(spec), "cases": [asdict(case) for case in cases]}
