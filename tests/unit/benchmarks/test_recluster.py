"""The benchmark of re-clustering: refusals, and every part measured."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_dist.benchmarks.recluster import PARTS, render, run_recluster_bench
from moe_dist.benchmarks.recluster_spec import ReclusterBenchSpec
from moe_dist.errors import ConfigError
from moe_dist.metrics import write_json


def test_every_part_is_measured_and_shown(tmp_path: Path) -> None:
    spec = ReclusterBenchSpec(experts=(8, 16), hidden=(12,), clusters=4, rank=2, tokens=6, sampled=2, repeats=2)
    said: list[str] = []
    result = run_recluster_bench(spec, said.append)
    assert said == ["d=12 E=8", "d=12 E=16"]
    for case in result.cases:
        assert list(case.seconds) == list(PARTS)
        assert all(0 < spread.smallest <= spread.median <= spread.largest for spread in case.seconds.values())
    out = io.StringIO()
    render(result, Console(file=out, width=200))
    assert all(part in out.getvalue() for part in PARTS)
    write_json(tmp_path / "figures.json", result.to_dict())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"experts": (12,), "clusters": 8}, "experts=12 is not divisible by clusters=8"),
        ({"hidden": (4,), "rank": 8}, "hidden=4 must be at least rank=8"),
        ({"repeats": 0}, "repeats=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReclusterBenchSpec(**words)  # type: ignore[arg-type]
