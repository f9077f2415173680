"""Scaling studies: their cells, resumption and failures, efficiency, files, and job arrays; runs are stood in for."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_dist.benchmarks import subruns
from moe_dist.config import load_config
from moe_dist.errors import ConfigError
from moe_dist.studies.runner import StudyCell, StudyOutcome, gather, run_cells, speed
from moe_dist.studies.scaling.cells import Axis, Mode, build_cells, parse_axis
from moe_dist.studies.scaling.plots import plot
from moe_dist.studies.scaling.slurm import array_jobs
from moe_dist.studies.scaling.tables import render, rows, to_dict, write_csv

SMOKE = Path(__file__).parents[3] / "configs" / "test" / "smoke.yaml"
AXES = [Axis("ranks", ("2", "4")), Axis("experts", ("16", "32"))]


def _summary(speed: float) -> dict[str, Any]:
    return {
        "tokens_per_second": speed,
        "all_to_all": {"bytes_per_token_layer": 10.0, "bytes_inter_node": 0},
        "memory": {"peak_rss_bytes": 2**20, "peak_device_bytes": 0},
        "validation": {"loss": 5.0},
    }


def test_axes_are_read_and_refused() -> None:
    assert parse_axis("experts=16, 32") == Axis("experts", ("16", "32"))
    assert parse_axis("experts=16").key == "moe.experts"
    assert parse_axis("world.zero_stage=1,2").key == "world.zero_stage"
    for word in ("ranks", "ranks=", "=1", "ranks=1,,2", "ranks=1,1", "ranks=0,1", "ranks=x"):
        with pytest.raises(ConfigError, match="--axis"):
            parse_axis(word)


def test_cells_are_all_combinations_round_by_round() -> None:
    cells = build_cells(SMOKE, AXES, Mode.STRONG, 2, 1, ("train.steps=5",))
    assert [(cell.ranks, dict(cell.values)["experts"], cell.repeat) for cell in cells[:5]] == [
        (2, "16", 0), (2, "32", 0), (4, "16", 0), (4, "32", 0), (2, "16", 1),
    ]  # fmt: skip
    assert len({cell.result_file(Path()) for cell in cells}) == 8
    loaded = cells[1].load()
    assert (loaded.moe.experts, loaded.train.steps, loaded.train.global_batch_size) == (32, 5, 16)


def test_weak_scaling_keeps_the_batch_of_a_rank() -> None:
    cells = build_cells(SMOKE, [Axis("ranks", ("2", "6"))], Mode.WEAK, 1, 1, ())
    assert [cell.load().train.global_batch_size for cell in cells] == [16, 48]


def test_combinations_that_cannot_run_say_why_and_all_of_them_are_an_error() -> None:
    cells = build_cells(SMOKE, [Axis("ranks", ("3", "4"))], Mode.STRONG, 1, 1, ())
    assert cells[0].refusal == "train.global_batch_size=16 is not divisible by 3 ranks: 15 or 18 would be"
    assert cells[1].refusal is None
    with pytest.raises(ConfigError, match=r"no cell of the study can run.*moe\.clusters"):
        build_cells(SMOKE, [Axis("experts", ("3", "5"))], Mode.STRONG, 1, 1, ())
    with pytest.raises(ConfigError, match="twice"):
        build_cells(SMOKE, [Axis("experts", ("16",)), Axis("moe.experts", ("32",))], Mode.STRONG, 1, 1, ())
    with pytest.raises(ConfigError, match="unknown key"):
        build_cells(SMOKE, [Axis("moe.expert", ("16",))], Mode.STRONG, 1, 1, ())


def _stand_in(started: list[list[str]], speed_of: Callable[[int], float | None]) -> Callable[..., str | None]:
    def run(command: list[str], seconds: float | None = None) -> str | None:
        started.append(command)
        speed = speed_of(int(command[command.index("--ranks") + 1]))
        if speed is None:
            return "rank 1 failed: out of luck"
        Path(command[command.index("--json") + 1]).write_text(json.dumps(_summary(speed)))
        return None

    return run


def test_finished_cells_are_kept_failed_ones_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(subruns, "run", _stand_in(started, lambda ranks: None if ranks == 4 else 100.0))
    cells = build_cells(SMOKE, AXES, Mode.STRONG, 1, 1, ())
    said: list[str] = []
    outcomes = run_cells(cells, tmp_path, said.append, speed, launcher="torchrun")
    assert [outcome.problem for outcome in outcomes] == [None, None, *["rank 1 failed: out of luck"] * 2]
    assert said[0].startswith("1/4 ranks-2_experts-16_0: 100 tokens/s")
    assert "no result: rank 1 failed" in said[3]
    command = started[0]
    assert command[:5] == [sys.executable, "-m", "moe_dist", "launch", "--launcher"]
    load_config(command[8], [word for word in command[9:] if "=" in word])
    run_cells(cells, tmp_path, said.append, speed, launcher="torchrun")
    assert len(started) == 4 + 2
    assert [bool(outcome.summary) for outcome in gather(cells, tmp_path)] == [True, True, False, False]


def test_a_cell_that_hangs_is_ended() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert subruns.run(command, 0.5) == "took longer than 0 s"
    assert subruns.run([sys.executable, "-c", "import sys; sys.exit('boom')"]) == "boom"


def _outcomes(speeds: dict[int, list[float]]) -> list[StudyOutcome]:
    cells = {ranks: StudyCell((("ranks", str(ranks)),), ranks, 0, SMOKE, ()) for ranks in speeds}
    return [
        StudyOutcome(cells[ranks], _summary(speed) if speed else None, None if speed else "failed")
        for ranks, values in speeds.items()
        for speed in values
    ]


def test_efficiency_is_speed_over_the_ideal_line(tmp_path: Path) -> None:
    outcomes = _outcomes({2: [90, 100, 140], 4: [150], 8: [0]})
    table = rows(outcomes)
    assert [row.efficiency for row in table] == [1.0, 0.75, None]
    assert table[0].middle("tokens_per_second") == 100
    assert table[2].problems == ("failed",)
    console = Console(record=True, width=140, file=open(os.devnull, "w"))  # noqa: SIM115
    render(table, console)
    shown = console.export_text()
    assert "90 - 140" in shown
    assert "75%" in shown
    assert "ranks=8: failed" in shown
    write_csv(outcomes, table, tmp_path)
    with (tmp_path / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [cell["tokens_per_second"] for cell in cells] == ["90", "100", "140", "150", ""]
    assert cells[4]["problem"] == "failed"
    with (tmp_path / "table.csv").open() as file:
        combined = list(csv.DictReader(file))
    assert combined[0]["tokens_per_second_median"] == "100.0"
    assert combined[1]["efficiency"] == "0.75"
    assert json.loads(json.dumps(to_dict(table)))["rows"][1]["values"] == {"ranks": "4"}


@pytest.mark.parametrize("axis", ["ranks", "kind"])
def test_plots_are_drawn_even_of_failures(tmp_path: Path, axis: str) -> None:
    table = rows(_outcomes({2: [90.0], 4: [150.0], 8: [0]}))
    renamed = [type(row)(**{**vars(row), "values": ((axis, str(row.ranks)),)}) for row in table]
    plot(renamed, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_job_array_runs_every_missing_cell(tmp_path: Path) -> None:
    folder, tools = tmp_path / "a study", tmp_path / "bin"
    folder.mkdir()
    tools.mkdir()
    cells = build_cells(SMOKE, [Axis("ranks", ("1", "2", "3")), Axis("experts", ("16", "32"))], Mode.STRONG, 1, 1, ())
    cells[0].result_file(folder).write_text(json.dumps(_summary(1.0)))
    jobs = array_jobs(cells, folder, python="python of the job")
    assert list(jobs) == ["study-1.sbatch", "study-2.sbatch"]  # 3 ranks do not divide the batch
    assert "--array=0-0%1" in jobs["study-1.sbatch"]
    assert "--array=0-1%1\n" in jobs["study-2.sbatch"]
    assert "--ntasks=2\n" in jobs["study-2.sbatch"]
    script = tmp_path / "study-2.sbatch"
    script.write_text(jobs["study-2.sbatch"])
    (tools / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$MOE_DIST_INIT_METHOD" "$@" > "$SEEN"\n')
    (tools / "srun").chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SEEN": str(tmp_path / "seen")}
    for task, cell in enumerate(cells[2:4]):
        subprocess.run(["bash", str(script)], env={**environment, "SLURM_ARRAY_TASK_ID": str(task)}, check=True)
        rendezvous, option, *command = (tmp_path / "seen").read_text().splitlines()
        assert rendezvous.startswith(f"file://{folder}/rendezvous-")
        assert option == "--kill-on-bad-exit=1"
        assert command[:5] == ["python of the job", "-m", "moe_dist", "train", str(SMOKE)]
        assert load_config(command[4], [word for word in command[5:] if "=" in word]).moe.experts == 16 * (task + 1)
        assert command[-2:] == ["--json", str(cell.result_file(folder))]
    assert not list(folder.glob("rendezvous-*"))
    other = subprocess.run(["bash", str(script)], env={**environment, "SLURM_ARRAY_TASK_ID": "9"}, check=False)
    assert other.returncode == 2
