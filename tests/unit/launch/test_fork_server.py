"""Ranks forked from one server behave like the processes that they stand for."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moe_dist.launch.fork_server import fork_server
from moe_dist.launch.processes import has_ended

SCRIPT = Path(__file__).with_name("forked_rank.py")
TASK = "tests.unit.launch.forked_task"
LIMIT = 60.0
BASE = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def started(variables: dict[str, str], *words: str, folder: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT), *words]
    environment = {**BASE, **variables}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def assert_ended(pid: int) -> None:
    deadline = time.monotonic() + LIMIT
    while not has_ended(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    with fork_server(tmp_path, BASE, TASK) as variables:
        yield variables


def test_a_rank_has_the_place_of_its_proxy(server: dict[str, str], tmp_path: Path) -> None:
    with started({**server, "WORD": "a=b\n\u00e9"}, "exit", "5", folder=tmp_path) as process:
        out, err = process.communicate(timeout=LIMIT)
    found = json.loads(out)
    assert found["pid"] != process.pid
    assert found["group"] == found["pid"]  # signals to its group reach no other rank and not the server
    assert (found["folder"], found["rest"], found["word"]) == (str(tmp_path), ["5"], "a=b\n\u00e9")
    assert (found["input"], found["socket"]) == ("", False)
    assert (process.returncode, err) == (5, "to standard error\n")


def test_several_ranks_are_forked_from_one_process(server: dict[str, str]) -> None:
    with started(server, "wait") as one, started(server, "wait") as two:
        pids = [first_line(process)["pid"] for process in (one, two)]
        parents = {parent_of(pid) for pid in pids}
    assert len(set(pids)) == 2
    assert len(parents) == 1


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGABRT])
def test_a_proxy_ends_by_the_signal_that_ended_its_rank(server: dict[str, str], signum: int) -> None:
    with started(server, "die", str(int(signum))) as process:
        assert process.wait(LIMIT) == -signum


def test_signals_to_a_proxy_reach_its_rank(server: dict[str, str]) -> None:
    with started(server, "wait") as process:
        first_line(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 21


def test_no_rank_outlives_its_proxy(server: dict[str, str]) -> None:
    with started(server, "wait") as process:
        pid = first_line(process)["pid"]
        process.kill()
        assert_ended(pid)


def test_a_proxy_ends_with_the_server(tmp_path: Path) -> None:  # and so does its rank, which watches its parent
    with fork_server(tmp_path, BASE, TASK) as variables, started(variables, "wait") as process:
        pid = first_line(process)["pid"]
        os.kill(parent_of(pid), signal.SIGKILL)
        assert process.wait(LIMIT) == -signal.SIGKILL
    os.kill(pid, signal.SIGKILL)


def test_the_end_of_the_job_ends_its_ranks(tmp_path: Path) -> None:
    with fork_server(tmp_path, BASE, TASK) as variables, started(variables, "wait") as process:
        pid = first_line(process)["pid"]
        os.kill(process.pid, signal.SIGSTOP)  # a proxy that cannot react
    assert has_ended(pid)


@pytest.mark.parametrize(
    ("of_the_server", "of_the_rank"),
    [
        ({"SERVER_HAS_A_THREAD": "1"}, {}),
        ({"SERVER_FAILS": "1"}, {}),
        ({}, {"OMP_NUM_THREADS": "3"}),
        ({}, {"MOE_DIST_FORK_SERVER": "/nowhere"}),
    ],
    ids=["a thread", "no import", "other threads", "no server"],
)
def test_a_rank_that_cannot_be_forked_runs_itself(
    tmp_path: Path, of_the_server: dict[str, str], of_the_rank: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        fork_server(tmp_path, {**BASE, **of_the_server}, TASK) as variables,
        started({**variables, **of_the_rank}, "exit", "5") as process,
    ):
        out, _ = process.communicate(timeout=LIMIT)
    assert (out, process.returncode) == ("ran in its own process\n", 0)
    assert "Traceback" not in capfd.readouterr().err
