"""Every file operation of a run may fail: training goes on, or ends in one line and can be resumed."""

import errno
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from moe_dist.config import load_config
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.model.language_model import LanguageModel
from moe_dist.training import trainer
from tests.distributed.file_faults import NUMBERS, Fault, FileFaults
from tests.distributed.ranks import run_ranks

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"
PARTS = 12


def _words(folder: Path, *more: str) -> list[str]:
    return [
        f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "train.steps=4", "train.eval_every=2",
        "checkpoint.every=2", "checkpoint.keep_last=1", "corpus.max_bytes=100000", "tensorboard=true",
        "picture=false", "checkpoint.resume=auto", "model.layers=1", "moe.experts=4", "moe.clusters=2",
        "train.global_batch_size=2", "train.eval_sequences=2", *more,
    ]  # fmt: skip


def _train(folder: Path, fault: Fault | None = None) -> tuple[FileFaults, MoeDistError | None, str]:
    """Train in this process; return the operations counted, the error, and the output."""
    faults, error, output = FileFaults(folder, fault), None, io.StringIO()
    try:
        with redirect_stdout(output), faults, mock.patch.object(trainer, "shutdown"):  # the next run uses the group
            trainer.train(load_config(SMOKE, _words(folder)))
    except MoeDistError as caught:
        error = caught
    return faults, error, output.getvalue()


def _losses(folder: Path) -> Any:
    runs = sorted((folder / "runs").iterdir())
    return json.loads((runs[-1] / "summary.json").read_text())["validation"]["curve"]


def _faults(folder: Path) -> list[Fault]:
    """Return faults at the first and the last operation of every place, each with another error."""
    counts = [*_train(folder)[0].counts.items()]
    counts += [item for item in _train(folder)[0].counts.items() if item[0] not in dict(counts)]
    found, number = [], 0
    lasting = [
        place for place in dict(counts) if place.operation in ("open", "mkdir") and place.file.startswith("runs")
    ]
    found += [Fault(place, 1, errno.ENOSPC, lasting=True) for place in lasting]
    for place, count in counts:
        for nth in sorted({1, count}):
            found.append(Fault(place, nth, NUMBERS[number % len(NUMBERS)]))
            number += 1
    return found


def _try_faults(folder: Path, part: int) -> list[str]:
    straight = folder / "straight"
    # the first run prepares its data, the second resumes, as those with faults do
    faults, wanted = _faults(straight)[part::PARTS], _losses(straight)
    problems = []
    for fault in faults:
        with tempfile.TemporaryDirectory() as own:
            if not fault.place.file.startswith("cache"):
                shutil.copytree(straight / "cache", Path(own) / "cache")
            problem = _try_one(Path(own), fault, wanted)
            if problem:
                problems.append(f"{fault}\n    {problem}")
    return problems


def _try_one(folder: Path, fault: Fault, wanted: Any) -> str | None:
    try:
        faults, error, output = _train(folder, fault)
    except BaseException:
        return "no one line: " + traceback.format_exc()[-1500:]
    if not faults.happened:
        return None
    if _loses_nothing(fault) and not fault.lasting:
        if error is not None:
            return f"training did not go on: {error}"
        again = fault.number == errno.ENOENT  # a missing file or folder is made at once
        if not again and (f"{folder}/runs/smoke" not in output or "warning: " not in output):
            return f"no note: {output}"
    if error is not None:
        line = str(error)
        if "\n" in line or str(folder) not in line:
            return f"the line names no folder: {line}"
    try:
        _, refusal, _ = _train(folder)
    except BaseException:
        return f"cannot be resumed after {error}: " + traceback.format_exc()[-1500:]
    if refusal is not None:
        return f"cannot be resumed after {error}: {refusal}"
    if _losses(folder) != wanted:
        return f"other losses after {error}"
    return None


def _loses_nothing(fault: Fault) -> bool:
    """Return True for a single fault in metrics, events, TensorBoard, a checkpoint, or the matrices of traffic."""
    where = fault.place.where
    checkpoint = where.startswith("checkpoint/storage.py") or where.endswith("write_manifest")
    matrices = "traffic.json" in fault.place.file
    kept = checkpoint and "smoke/CHECKPOINT" in fault.place.file  # the final weights are no copy
    return where.startswith("metrics/append_file.py") or kept or matrices


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_failed_file_operation_is_survived_or_one_line(tmp_path: Path, part: int) -> None:
    [problems] = run_ranks(_try_faults, 1, tmp_path, part, timeout=600)
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems)


def _train_and_remove(folder: Path) -> tuple[str, Any]:
    """Train, and remove the run's folder during the third step."""
    forward, calls = LanguageModel.forward, 0

    def removing(self: LanguageModel, sequence_BS: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # after an evaluation, with its own pass
            shutil.rmtree(folder / "runs" / "smoke")
        return forward(self, sequence_BS)

    with mock.patch.object(LanguageModel, "forward", removing):
        _, error, output = _train(folder)
    assert error is None, error
    return output, _losses(folder)


def test_a_folder_removed_during_the_run_is_made_again(tmp_path: Path) -> None:
    [(output, losses)] = run_ranks(_train_and_remove, 1, tmp_path)
    run = tmp_path / "runs" / "smoke"
    assert f"{run} was removed during the run: its metrics and checkpoints of up to step" in output
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "tokenizer.model", "metrics.jsonl", "events.jsonl", "summary.json", "final"} <= names
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert (events[0]["event"], events[-1]["event"]) == ("started", "finished")
    assert losses[-1]["step"] == 4


def _train_into_a_full_file(folder: Path) -> None:
    with open("/dev/full", "w") as full, mock.patch.object(sys, "stdout", full):
        trainer.train(load_config(SMOKE, _words(folder)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no Linux")
def test_a_full_standard_output_ends_no_run(tmp_path: Path) -> None:
    run_ranks(_train_into_a_full_file, 1, tmp_path)
    assert _losses(tmp_path)[-1]["step"] == 4


def _train_without_home(folder: Path) -> str:
    """Return the refusal of the default cache, and train with one that is given."""
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    os.chdir(folder)
    with mock.patch("pwd.getpwuid", side_effect=KeyError("getpwuid(): uid not found: 12345")):
        with pytest.raises(ConfigError) as refused:
            load_config(SMOKE, [f"runs_dir={folder}/runs"])
        trainer.train(load_config(SMOKE, _words(folder)))
    return str(refused.value)


def test_a_user_without_a_home_is_refused_in_one_line_or_trains(tmp_path: Path) -> None:
    [line] = run_ranks(_train_without_home, 1, tmp_path)
    assert "corpus.cache_dir" in line
    assert "\n" not in line
    assert _losses(tmp_path)[-1]["step"] == 4
    assert not (tmp_path / "~").exists()
