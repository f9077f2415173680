"""How a rank tells what went wrong, and which of several faults is named."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.errors import ConfigError, DataError, TrainingError
from moe_dist.launch import faults
from moe_dist.launch.faults import Fault, root_cause


def test_the_first_fault_that_is_no_consequence_is_the_cause() -> None:
    lost = Fault(0, 1.0, "RuntimeError: Connection closed by peer", 1, consequence=True)
    late, early = Fault(1, 3.0, "ValueError: late", 1), Fault(2, 2.0, "ValueError: early", 1)
    assert root_cause([lost, late, early]) == early
    assert root_cause([lost]) == lost
    assert root_cause([]) is None


@given(st.permutations([Fault(rank, float(rank), "x", 1, rank < 2) for rank in range(5)]))
def test_the_cause_does_not_depend_on_the_order_of_reading(seen: list[Fault]) -> None:
    cause = root_cause(seen)
    assert cause is not None
    assert cause.rank == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("boom\n  twice"), "ValueError: boom twice"),
        (ValueError(), "ValueError"),
        (TrainingError("step 3: loss is nan"), "step 3: loss is nan"),
        (RuntimeError("x" * 9999), "RuntimeError: " + "x" * (500 - 14 - 4) + " ..."),
    ],
)
def test_an_error_is_described_in_one_line(error: Exception, line: str) -> None:
    assert faults.describe(error) == line


@pytest.mark.parametrize(
    ("error", "consequence", "code"),
    [
        (ValueError("boom"), False, 1),
        (ConnectionResetError("x"), True, 1),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), True, 1),
        (ConfigError("hub: Connection reset by peer"), False, 2),
    ],
)
def test_a_supervised_rank_records_its_fault(
    error: Exception,
    consequence: bool,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(os.environ, faults.JOB_FOLDER, str(tmp_path))
    assert faults.report(1, 4, error) == code
    found = faults.read_fault(tmp_path, 1)
    assert found is not None
    assert (found.line, found.consequence, found.exit_code) == (faults.describe(error), consequence, code)
    assert faults.read_fault(tmp_path, 0) is None
    shown = capsys.readouterr().err
    assert "moe-dist:" not in shown  # the supervisor says it, last
    assert ("Traceback" in shown or "ValueError" in shown) == (code == 1 and not consequence)


@pytest.mark.parametrize(("world", "line"), [(1, "moe-dist: error: boom"), (4, "moe-dist: rank 1 failed: boom")])
def test_without_supervisor_the_rank_says_it_last(
    world: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(faults.JOB_FOLDER, raising=False)
    assert faults.report(1, world, TrainingError("boom")) == 1
    assert capsys.readouterr().err == line + "\n"


def test_without_supervisor_a_lost_peer_is_one_line_that_blames_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(faults.JOB_FOLDER, raising=False)
    lost = RuntimeError("gloo: Connection closed by peer [127.0.0.1]:3")
    assert faults.report(1, 4, lost) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("moe-dist: rank 1 lost its connection: another rank ended first")
    assert shown.count("\n") == 1
    assert faults.report(0, 1, lost) == 1  # alone there is no peer
    assert "Traceback" not in shown
    assert "moe-dist: error: RuntimeError: gloo" in capsys.readouterr().err


def test_a_batch_script_learns_of_refusals_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = tmp_path / "refusals"
    monkeypatch.setitem(os.environ, faults.REFUSALS, str(refusals))
    assert faults.report(1, 4, TrainingError("step 3: loss is nan")) == 1
    assert not refusals.exists()
    assert [faults.report(rank, 4, DataError("no text")) for rank in range(2)] == [2, 2]
    assert refusals.read_text() == "no text\n" * 2
    monkeypatch.setitem(os.environ, faults.REFUSALS, str(tmp_path / "missing" / "refusals"))
    assert faults.report(1, 4, DataError("no text")) == 2
