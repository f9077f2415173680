"""`moe-dist bench step`: speed of whole training steps by kind of layer, and the time of their parts.

Models of all kinds are trained side by side, some steps of each in every round, so that a busy machine slows them
alike. Then some more steps of each are profiled; these synchronize before every collective and are somewhat slower, so
that shares mean more than times.
"""

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from moe_dist.benchmarks.baselines.megatron_gpt import MegatronTraining
from moe_dist.benchmarks.step.parts import profile_attention, step_profiler
from moe_dist.benchmarks.step.profiler import StepPart, StepProfiler
from moe_dist.benchmarks.step.spec import StepBenchSpec, is_megatron
from moe_dist.config import RunConfig, resolve_world
from moe_dist.console import titled_table, wide_console
from moe_dist.data import PreparedData, prepare_data
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.metrics import installed_versions, write_json
from moe_dist.metrics.recorder import NullRecorder
from moe_dist.metrics.spread import Spread
from moe_dist.training.preemption import StopSignals
from moe_dist.training.trainer import Trainer

OF_MOE_LAYERS = (StepPart.ROUTING, StepPart.PERMUTE, StepPart.ALL_TO_ALL, StepPart.EXPERTS, StepPart.COUNTERS)
OVERHEAD = (StepPart.ROUTING, StepPart.PERMUTE, StepPart.COUNTERS, StepPart.METRICS)


@dataclass(frozen=True)
class StepFigures:
    """Result of one kind of layer; step seconds are of the slowest rank, parts are means over ranks and steps."""

    tokens_per_second: Spread
    over_last: Spread
    """Speed over that of the last kind, within rounds."""
    parts: dict[str, float]

    @property
    def overhead(self) -> float | None:
        """Time of routing, permutation, counters and metrics over that of MoE layers and these, or None."""
        layers = sum(self.parts.get(part, 0.0) for part in {*OF_MOE_LAYERS, *OVERHEAD})
        return sum(self.parts.get(part, 0.0) for part in OVERHEAD) / layers if layers else None


@dataclass(frozen=True)
class StepBenchResult:
    """Result of all kinds, with the specification and versions."""

    spec: StepBenchSpec
    ranks: int
    threads: int
    config: dict[str, Any]
    kinds: dict[str, StepFigures]
    versions: dict[str, str | None] = field(default_factory=installed_versions)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings for JSON; times in seconds."""
        overheads = {kind: figures.overhead for kind, figures in self.kinds.items()}
        return {**asdict(self), "overhead": overheads}


def bench_step(config: RunConfig, spec: StepBenchSpec) -> None:
    """Measure every kind, and print and write the figures on rank 0; collective.

    Raises:
        ConfigError: a kind does not fit the configuration or the number of ranks.
    """
    with step_profiler() as profiler, TemporaryDirectory() as folder:  # before DeepSpeed is initialised
        process = init_distributed(config.world)
        data = prepare_data(config.corpus, config.tokenizer)
        runs: dict[str, _TimedTraining | _TimedMegatron] = {
            kind: _TimedMegatron(MegatronTraining(single, process, data))
            if is_megatron(kind)
            else _TimedTraining(single, process, data, profiler, Path(folder))
            for kind, single in spec.configs(config).items()
        }
        for run in runs.values():
            run.steps(spec.warmup)
        seconds = {kind: _slowest(values) for kind, values in _rounds(runs, spec).items()}
        parts = {kind: run.divided(spec.divided) for kind, run in runs.items()}
    tokens = config.train.global_batch_size * config.model.sequence_length
    speeds = {kind: [tokens / each for each in values] for kind, values in seconds.items()}
    figures = {
        kind: StepFigures(Spread.of(values), Spread.of_ratios(values, speeds[spec.kinds[-1]]), parts[kind])
        for kind, values in speeds.items()
    }
    if process.rank == 0:
        result = StepBenchResult(spec, process.ranks, torch.get_num_threads(), config.model_dump(), figures)
        render(result, wide_console())
        if spec.json_file is not None:
            write_json(Path(spec.json_file), result.to_dict())
    shutdown()


class _TimedTraining:
    """Model of one kind in training; it writes no files."""

    def __init__(
        self, config: RunConfig, process: RankInfo, data: PreparedData, profiler: StepProfiler, folder: Path
    ) -> None:
        self.profiler, self.signals, self.done = profiler, StopSignals(), 0  # not entered: signals end a measurement
        self.run = Trainer(config, process, resolve_world(config, process.ranks), data, NullRecorder(folder))
        self.run.start()
        self.run.engine.wrap_reduction(partial(profiler.wrap, StepPart.REDUCTION))
        for layer in self.run.model.gpt.decoder.layers:  # type: ignore[union-attr]
            profile_attention(profiler, layer.self_attention)

    def steps(self, count: int) -> float:
        """Train some steps; return the mean seconds of a step."""
        started = time.perf_counter()
        for _ in range(count):
            self.done += 1
            self.run.train_step(self.done, self.signals)
        return (time.perf_counter() - started) / count

    def divided(self, count: int) -> dict[str, float]:
        """Train some steps; return the seconds of a step by part, mean over steps and ranks; collective."""
        if not count:
            return {}
        self.profiler.clear()
        self.profiler.start()
        self.steps(count)
        self.profiler.stop()
        mine = torch.tensor([self.profiler.seconds[part] / count for part in StepPart], dtype=torch.float64)
        dist.all_reduce(mine)
        return dict(zip(map(str, StepPart), (mine / dist.get_world_size()).tolist(), strict=True))


@dataclass
class _TimedMegatron:
    """Megatron-core's own GPT in training; its parts are not profiled."""

    training: MegatronTraining

    def steps(self, count: int) -> float:
        """Train some steps; return the mean seconds of a step."""
        started = time.perf_counter()
        for _ in range(count):
            self.training.step()
        return (time.perf_counter() - started) / count

    def divided(self, count: int) -> dict[str, float]:
        """Return no parts."""
        return {}


def _rounds(runs: dict[str, _TimedTraining | _TimedMegatron], spec: StepBenchSpec) -> dict[str, list[float]]:
    """Return the mean seconds of a step of each kind in each round; each kind starts a round in turn."""
    names, seconds = list(runs), {name: list[float]() for name in runs}
    for index in range(spec.rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier()
            seconds[name].append(runs[name].steps(spec.steps))
    return seconds


def _slowest(seconds: list[float]) -> list[float]:
    mine = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    slowest: list[float] = mine.tolist()
    return slowest


def render(result: StepBenchResult, console: Console) -> None:
    """Print two tables: speeds, and the parts of a step."""
    console.width = max(console.width, 120)
    last = result.spec.kinds[-1]
    title = f"{result.ranks} ranks of {result.threads} thread(s), median of rounds [quartiles]"
    speeds = titled_table(title, "layer")
    for name in ("tokens/s", f"this / {last}", "routing + permute + counters + metrics"):
        speeds.add_column(name, justify="right")
    for kind, figures in result.kinds.items():
        overhead = "" if figures.overhead is None else f"{figures.overhead:.1%} of MoE layers"
        speeds.add_row(kind, figures.tokens_per_second.text(1, 0), figures.over_last.text(), overhead)
    console.print(speeds)
    if not result.spec.divided:
        return
    title = "ms of a step (share), mean over ranks, collectives synchronised"
    parts = titled_table(title, "part")
    divided = {kind: figures.parts for kind, figures in result.kinds.items() if figures.parts}
    for kind in divided:
        parts.add_column(kind, justify="right")
    for part in StepPart:
        shares = [(seconds[part], seconds[part] / sum(seconds.values())) for seconds in divided.values()]
        parts.add_row(part, *(f"{1e3 * seconds:,.1f} ({share:.1%})" for seconds, share in shares))
    console.print(parts)
