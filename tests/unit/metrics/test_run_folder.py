"""The run folder: what it holds, that runs never mix, that a broken run can still be read."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.metrics import REQUIRED_KEYS, RunFolder, installed_versions, missing_keys, peak_rss_bytes, wall_clock
from moe_dist.metrics.wall_clock import SUPERVISOR, job_seconds
from tests.unit.metrics.example import summary


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not strict JSON")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


def test_holds_config_metrics_events_and_summary(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    with RunFolder.create(tmp_path / "runs", "demo", "seed: 0\n", tensorboard=False, summary_copy=copy) as run:
        run.log(10, {"loss": np.float32(2.5), "load": {"cv2": float("nan"), "counts": np.array(3)}})
        run.log(20, {"loss": float("inf")})
        run.event("checkpoint", 20, path="x", values=(1, 2))
        run.write_summary(summary())
    assert (run.path / "config.yaml").read_text() == "seed: 0\n"
    first, second = lines(run.path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["load"]) == (10, 2.5, {"cv2": None, "counts": 3})
    assert second["loss"] is None
    (event,) = lines(run.path / "events.jsonl")
    assert (event["event"], event["step"], event["values"]) == ("checkpoint", 20, [1, 2])
    assert json.loads((run.path / "summary.json").read_text()) == summary() == json.loads(copy.read_text())
    assert not (run.path / "tensorboard").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_a_taken_name_gets_a_suffix_and_keeps_its_files(tmp_path: Path) -> None:
    runs = [RunFolder.create(tmp_path, "demo", f"seed: {i}\n", tensorboard=False) for i in range(3)]
    assert [run.path.name for run in runs] == ["demo", "demo-2", "demo-3"]
    assert [(run.path / "config.yaml").read_text() for run in runs] == [f"seed: {i}\n" for i in range(3)]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoeDistError, match=r"^runs_dir='.*file': cannot create a run folder: [^\n]+$"):
        RunFolder.create(tmp_path / "file", "demo", "", tensorboard=False)


def test_a_summary_that_breaks_the_contract_is_refused(tmp_path: Path) -> None:
    lacking = summary()
    del lacking["load"]["cv2"], lacking["seed"]
    with (
        RunFolder.create(tmp_path, "demo", "", tensorboard=False) as run,
        pytest.raises(ValueError, match=r"^summary lacks load\.cv2, seed$"),
    ):
        run.write_summary(lacking)
    assert not (run.path / "summary.json").exists()
    assert missing_keys({}) == list(REQUIRED_KEYS)


@pytest.mark.parametrize(("error", "event"), [(KeyboardInterrupt(), "interrupted"), (ValueError("boom"), "failed")])
def test_how_a_run_ended_is_an_event(tmp_path: Path, error: BaseException, event: str) -> None:
    run = RunFolder.create(tmp_path, "demo", "", tensorboard=False)

    def work() -> None:
        with run:
            run.log(7, {"loss": 1.0})
            raise error

    with pytest.raises(type(error)):
        work()
    (last,) = lines(run.path / "events.jsonl")
    assert (last["event"], last["step"]) == (event, 7)
    assert ("boom" in last.get("error", "")) == (event == "failed")


def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    work = (
        "import sys, time; from moe_dist.metrics import RunFolder\n"
        "run = RunFolder.create(sys.argv[1], 'demo', '', tensorboard=False)\n"
        "for step in range(5): run.log(step, {'loss': 1.0})\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", work, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert [line["step"] for line in lines(tmp_path / "demo" / "metrics.jsonl")] == list(range(5))


def test_tensorboard_gets_numbers_by_dotted_key(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "demo", "") as run:
        run.log(1, {"loss": 2.0, "note": "text", "load": {"cv2": 0.5}})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["load/cv2", "loss"]


def test_host_figures() -> None:
    assert peak_rss_bytes() > 10_000_000
    assert {"python", "torch", "deepspeed", "megatron-core", "moe-dist"} == set(installed_versions())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no Linux")
def test_a_process_is_younger_than_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUPERVISOR, raising=False)
    code = "from moe_dist.metrics.wall_clock import job_seconds; print(job_seconds())"

    def age_of_child() -> float:
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    before = job_seconds()
    child = age_of_child()
    monkeypatch.setenv(SUPERVISOR, str(os.getpid()))
    job = age_of_child()
    after = job_seconds()
    assert before is not None
    assert after is not None
    assert 0 < child < after - before + 0.02 < after + 0.02  # twice 10 ms of the clock's grain
    assert before - 0.02 < job < after + 0.02  # a rank's job is as old as its supervisor


def test_phases_of_the_wall_clock_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 7.0, 8.5, 99.0, 20.0, 21.0])
    monkeypatch.setattr(wall_clock, "job_seconds", lambda: next(times))
    clock = wall_clock.WallClock()  # 5: imports are done
    clock.phase_ends("prepare")  # 7
    clock.first_step_ends()  # 8.5
    clock.phase_ends("prepare")  # a model built again, in the middle: no new phase
    next(times)
    clock.phase_ends("train")  # 20
    assert clock.seconds() == {"start": 5.0, "prepare": 2.0, "train": 13.0, "end": 1.0}
    assert clock.first_step == 8.5


def test_a_run_that_goes_on_repeats_no_line(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "demo", "seed: 0\n", tensorboard=False) as run:
        for step in range(1, 6):
            run.log(step, {"loss": step})
            run.event("evaluation", step)
        run.write_summary(summary())
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    (run.path / "load.jsonl").write_text('{"step": 3}\n{"step": 4}\nnot JSON\n[]\n')
    with RunFolder.reopen(run.path, 3, "seed: 0\nrank: 2\n", tensorboard=False) as again:
        again.log(4, {"loss": 40})
    assert [(line["step"], line["loss"]) for line in lines(run.path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert lines(run.path / "load.jsonl") == [{"step": 3}]
    assert len(lines(run.path / "events.jsonl")) == 5
    assert not (run.path / "summary.json").exists()
    assert (run.path / "config.yaml").read_text() == "seed: 0\nrank: 2\n"
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_that_cannot_go_on_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: cannot be locked for this job: [^\n]+$"):
        RunFolder.reopen(tmp_path / "nowhere", 3, "", tensorboard=False)
