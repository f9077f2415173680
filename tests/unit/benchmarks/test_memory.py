"""The benchmark of memory: refusals, ratios, and two small runs whose figures hang together."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_dist.benchmarks.memory import (
    OFFLOAD,
    MemoryBenchCase,
    MemoryBenchResult,
    MemoryBenchSpec,
    render,
    run_memory_bench,
)
from moe_dist.errors import ConfigError
from moe_dist.metrics import write_json


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"repeats": 0}, "repeats=0 must be 1 or more"),
        ({"steps": 1}, "steps=1 leaves nothing to time"),
        ({"cases": ("sparse",)}, "case='sparse' is unknown: it must be one of dense, standard, clustered"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryBenchSpec(**words)  # type: ignore[arg-type]


def test_ratios_are_of_medians() -> None:
    result = MemoryBenchResult(
        MemoryBenchSpec(),
        0,
        [
            MemoryBenchCase("dense", [100, 300, 200], 50, 50, [1.0], 0),
            MemoryBenchCase("clustered", [900], 30, 30, [10.0, 30.0, 20.0], 0),
            MemoryBenchCase(OFFLOAD, [210, 190, 220], 30, 10, [18.0], 5),
        ],
    )
    assert result.ratios() == {
        "offload_peak_over_dense": 210 / 200,
        "clustered_bytes_over_standard": None,
        "offload_speed_over_clustered": 18 / 20,
    }


@pytest.mark.slow
def test_offloaded_experts_take_less_of_the_device(tmp_path: Path) -> None:
    spec = MemoryBenchSpec(
        hidden=64, expert_hidden=64, layers=2, experts=8, clusters=4, rank=2, sequence_length=16, sequences=2, steps=2,
        budget=0.38, cases=("clustered", OFFLOAD),
    )  # fmt: skip
    result = run_memory_bench(spec, lambda line: None)
    plain, offloaded = result.cases
    assert plain.model_bytes == plain.peak_device_bytes == offloaded.model_bytes
    assert offloaded.peak_device_bytes < plain.peak_device_bytes
    assert (plain.bytes_moved_per_step, offloaded.bytes_moved_per_step > 0) == (0, True)
    assert min(plain.peak_bytes + offloaded.peak_bytes) > 0
    out = io.StringIO()
    render(result, Console(file=out, width=200))
    assert OFFLOAD in out.getvalue()
    write_json(tmp_path / "figures.json", result.to_dict())
