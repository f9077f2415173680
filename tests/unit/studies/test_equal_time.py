"""Steps that take equal time: from speeds of short runs, found again by the same command; failures are said."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_dist.benchmarks import subruns
from moe_dist.config import load_config
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.studies import equal_time, quality

CONFIGS = Path(__file__).parents[3] / "configs" / "experiment"
CORPORA = {"stdlib": ("corpus.kind=stdlib",)}
SPEED = {"standard-bias": [100.0, 90.0, 900.0], "good": [150.0, 150.0, 10.0], "cheap": [200.0, 190.0, 220.0]}


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the short runs that were trained; they are as fast as SPEED tells, by seed."""
    seen: list[str] = []

    def fake(command: list[str], seconds: float | None = None) -> str | None:
        target = Path(command[-1])
        words = [word for word in command if "=" in word]
        assert [word for word in words if word.startswith("train.steps=")][
            -1
        ] == f"train.steps={equal_time.PROBE_STEPS}"
        recipe, seed = re.match(r"r1_recipe-(.*)_corpus-stdlib_(\d)", target.name).groups()  # type: ignore[union-attr]
        seen.append(f"{recipe}-{seed}")
        summary: dict[str, Any] = {"tokens_per_second": SPEED[recipe][int(seed)], "validation": {"loss": 9.0}}
        target.write_text(json.dumps(summary))
        return None

    monkeypatch.setattr(subruns, "run", fake)
    return seen


def test_steps_are_those_of_the_baseline_times_the_ratio_of_median_speeds(tmp_path: Path, probed: list[str]) -> None:
    todo = quality.cells(CONFIGS, CORPORA, 3, list(SPEED), ())
    said: list[str] = []
    timed = equal_time.steps_for_equal_time(todo, "standard-bias", tmp_path, 1, said.append)
    assert [cell.name for cell in timed] == [cell.name for cell in todo]
    steps = {cell.value("recipe"): load_config(cell.config, cell.overrides).train.steps for cell in timed}
    assert steps == {"standard-bias": 200, "good": 300, "cheap": 400}
    assert any(line == "cheap: 200 tokens/s, 2.00 of standard-bias" for line in said)
    assert probed[:3] == ["standard-bias-0", "good-0", "cheap-0"]  # in turns
    again = equal_time.steps_for_equal_time(todo, "standard-bias", tmp_path, 1, said.append)
    assert (again, len(probed)) == (timed, 9)  # no short run was done twice


def test_a_baseline_that_is_not_run_is_refused(tmp_path: Path) -> None:
    todo = quality.cells(CONFIGS, CORPORA, 1, ["good", "cheap"], ())
    with pytest.raises(ConfigError, match=r"--equal-time dense: not among the recipes that are run \(good, cheap\)"):
        equal_time.steps_for_equal_time(todo, "dense", tmp_path, 1, print)


def test_a_short_run_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subruns, "run", lambda command, seconds=None: "out of memory")
    todo = quality.cells(CONFIGS, CORPORA, 1, ["good"], ())
    said: list[str] = []
    with pytest.raises(MoeDistError, match="recipe-good_corpus-stdlib_0"):
        equal_time.steps_for_equal_time(todo, "good", tmp_path, 1, said.append)
    assert any("out of memory" in line for line in said)
