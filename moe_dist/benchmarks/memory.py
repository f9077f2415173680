"""Memory of training by kind of experts; every case is a `moe-dist train` process of its own.

The peak of a case is its process's largest resident set less that of a process that only imports the same libraries.
Cases run one after another, round by round, so that ratios compare runs close in time. Offloaded blocks are in files,
which the page cache holds if there is enough memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from moe_dist.benchmarks import subruns
from moe_dist.benchmarks.layer.spec import CLUSTERS, EXPERT_WIDTH, EXPERTS, RANK, THREADS, WIDTH
from moe_dist.console import titled_table
from moe_dist.errors import ConfigError, TrainingError
from moe_dist.launch.options import option

OFFLOAD = "clustered + offload"
CASES: dict[str, tuple[str, ...]] = {
    "dense": ("moe.kind=dense",),
    "standard": ("moe.kind=standard",),
    "clustered": (),
    "clustered + INT4": ("precision.residuals=qat",),
    OFFLOAD: ("memory.offload=true",),
    "clustered + INT4 + offload": ("precision.residuals=qat", "memory.offload=true"),
}
"""Overrides of each case, by name."""
_FOOTPRINT = "import moe_dist.training.trainer; from moe_dist.metrics import peak_rss_bytes; print(peak_rss_bytes())"


@dataclass(frozen=True)
class MemoryBenchSpec:
    """Benchmark of the memory of training: shape of the model, and length of each run."""

    hidden: int = option(512, WIDTH)
    expert_hidden: int = option(1408, EXPERT_WIDTH)
    layers: int = option(6, "Layers of the model.")
    experts: int = option(32, EXPERTS)
    clusters: int = option(8, CLUSTERS)
    rank: int = option(8, RANK)
    sequence_length: int = option(256, "Tokens per sequence.")
    sequences: int = option(16, "Sequences per step.")
    steps: int = option(5, "Steps of each run; the first is not timed.")
    repeats: int = option(1, "Rounds over all cases; medians are reported.")
    threads: int = option(1, THREADS)
    budget: float = option(0.75, "As memory.device_budget_ratio.")
    cases: tuple[str, ...] = option(tuple(CASES), "A case; may be given again. Default: all.", flag="--case")

    def __post_init__(self) -> None:
        """Check that the specification can be measured."""
        for name in ("steps", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.steps < 2:
            raise ConfigError("steps=1 leaves nothing to time: the first step warms up; give 2 or more")
        unknown = [case for case in self.cases if case not in CASES]
        if unknown:
            raise ConfigError(f"case={unknown[0]!r} is unknown: it must be one of {', '.join(CASES)}")

    def words(self, case: str, folder: Path) -> list[str]:
        """Return the configuration of a case as overrides."""
        return [
            f"name={case.replace(' + ', '-')}",
            f"runs_dir={folder}",
            "tensorboard=false",
            f"model.hidden_size={self.hidden}",
            f"model.layers={self.layers}",
            "model.heads=8",
            f"model.sequence_length={self.sequence_length}",
            f"moe.expert_hidden={self.expert_hidden}",
            f"moe.experts={self.experts}",
            f"moe.clusters={self.clusters}",
            f"moe.rank={self.rank}",
            "moe.top_k=2",
            "moe.gate_scale=2",
            "corpus.max_bytes=2000000",
            "world.zero_stage=0",
            f"world.threads={self.threads}",
            "train.precision=float32",
            f"train.global_batch_size={self.sequences}",
            f"train.steps={self.steps}",
            "train.warmup_steps=1",
            "train.eval_every=0",
            "train.eval_sequences=1",
            "checkpoint.every=0",
            "checkpoint.save_final=false",
            f"memory.device_budget_ratio={self.budget}",
            f"memory.directory={folder}/tier",
            *CASES[case],
        ]


@dataclass(frozen=True)
class MemoryBenchCase:
    """Figures of one case; lists have one entry per round. Sizes in bytes."""

    name: str
    peak_bytes: list[int]
    """Peak resident set less the footprint of the libraries."""
    model_bytes: int
    """Size of weights, gradients and training state on all tiers."""
    peak_device_bytes: int
    """Peak of the part of them that was counted on the device."""
    tokens_per_second: list[float]
    bytes_moved_per_step: float


@dataclass
class MemoryBenchResult:
    """Result of all cases, with the specification."""

    spec: MemoryBenchSpec
    footprint_bytes: int
    cases: list[MemoryBenchCase] = field(default_factory=list)

    def case(self, name: str) -> MemoryBenchCase | None:
        """Return a case by its name; None if it was not run."""
        return next((case for case in self.cases if case.name == name), None)

    def ratio(self, name: str, other: str, figure: Callable[[MemoryBenchCase], float]) -> float | None:
        """Return the ratio of a figure of two cases."""
        one, two = self.case(name), self.case(other)
        return None if one is None or two is None else figure(one) / figure(two)

    def ratios(self) -> dict[str, float | None]:
        """Return the ratios that have a target."""
        return {
            "offload_peak_over_dense": self.ratio(OFFLOAD, "dense", lambda case: median(case.peak_bytes)),
            "clustered_bytes_over_standard": self.ratio("clustered", "standard", lambda case: case.model_bytes),
            "offload_speed_over_clustered": self.ratio(
                OFFLOAD, "clustered", lambda case: median(case.tokens_per_second)
            ),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for `--json`: specification, footprint, cases and ratios."""
        cases = [asdict(case) for case in self.cases]
        return {
            "spec": asdict(self.spec),
            "footprint_bytes": self.footprint_bytes,
            "cases": cases,
            "ratios": self.ratios(),
        }


def run_memory_bench(spec: MemoryBenchSpec, note: Callable[[str], None]) -> MemoryBenchResult:
    """Run every case in every round.

    Raises:
        TrainingError: a case failed; holds its last line.
    """
    result = MemoryBenchResult(spec, _footprint(spec))
    summaries: dict[str, list[dict[str, Any]]] = {case: [] for case in spec.cases}
    for number in range(spec.repeats):
        for case in spec.cases:
            with tempfile.TemporaryDirectory(prefix="moe-dist-memory-") as folder:
                summaries[case].append(_run(spec, case, Path(folder)))
            note(f"round {number + 1} of {spec.repeats}: {case}")
    result.cases = [_figures(case, found, result.footprint_bytes) for case, found in summaries.items()]
    return result


def render(result: MemoryBenchResult, console: Console) -> None:
    """Print one table, and the ratios that have a target."""
    table = titled_table("memory of training, MB")
    for column in ("case", "peak", "model", "device peak", "moved a step", "tokens/s (min, max)"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in result.cases:
        speeds = case.tokens_per_second
        table.add_row(
            case.name,
            _mb(median(case.peak_bytes)),
            _mb(case.model_bytes),
            _mb(case.peak_device_bytes),
            _mb(case.bytes_moved_per_step),
            f"{median(speeds):,.0f} ({min(speeds):,.0f}, {max(speeds):,.0f})",
        )
    console.print(table)
    console.print(f"footprint of interpreter and libraries, left out above: {_mb(result.footprint_bytes)} MB")
    for name, ratio in result.ratios().items():
        if ratio is not None:
            console.print(f"{name.replace('_', ' ')}: {ratio:.3f}")


def _run(spec: MemoryBenchSpec, case: str, folder: Path) -> dict[str, Any]:
    words = spec.words(case, folder)
    config = folder / "config.yaml"
    config.write_text("{}\n", encoding="utf-8")
    command = [sys.executable, "-m", "moe_dist", "train", str(config), *words]
    error = subruns.run([*command, "--json", str(folder / "summary.json")])
    if error is not None:
        raise TrainingError(f"bench memory: the case {case!r} failed: {error}")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def _footprint(spec: MemoryBenchSpec) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads)}
    command = [sys.executable, "-c", _FOOTPRINT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _figures(name: str, summaries: list[dict[str, Any]], footprint: int) -> MemoryBenchCase:
    memory, offload = summaries[0]["memory"], summaries[0]["memory"]["offload"]
    moved = 0 if offload is None else offload["bytes_in"] + offload["bytes_out"]
    on_device = memory["model_bytes"]
    if offload is not None:
        on_device += offload["peak_device_bytes"] - memory["offloadable_bytes"]
    return MemoryBenchCase(
        name,
        [summary["memory"]["peak_rss_bytes"] - footprint for summary in summaries],
        memory["model_bytes"],
        on_device,
        [summary["tokens_per_second"] for summary in summaries],
        moved / summaries[0]["steps"],
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"
