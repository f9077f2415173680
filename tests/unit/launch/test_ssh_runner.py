"""Jobs of several machines: agents started by a stand-in for ssh, ranks without torch; faults, signals, orphans."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_dist.errors import LaunchError
from moe_dist.launch import agent, ssh_runner
from moe_dist.launch.commands import node_command
from moe_dist.launch.faults import Fault
from moe_dist.launch.hostfile import Node
from moe_dist.launch.job import Job, Launcher
from moe_dist.launch.supervisor import STOPPED, JobOutcome
from tests.unit.launch.test_supervisor import JOB, LIMIT, assert_none_left, wait_for_ranks

HERE = Path(__file__).parent


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run's.yaml"  # a quote, which no shell may see
    path.write_text("train: {global_batch_size: 12}\n")
    return path


@contextmanager
def job(config: Path, *behaviour: str) -> Iterator["subprocess.Popen[str]"]:
    """One rank for each word of `behaviour`, the first half on machine a, the others on b."""
    variables = {f"RANK_{rank}": how for rank, how in enumerate(behaviour)}
    variables |= {"MOE_DIST_SSH": str(HERE / "fake_ssh.sh"), "FAKE_RENDEZVOUS": str(config.parent)}
    command = [sys.executable, str(JOB), "ssh", str(len(behaviour)), str(config)]
    with subprocess.Popen(
        command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def test_all_succeed(config: Path) -> None:
    with job(config, "succeed", "succeed", "succeed", "succeed") as child:
        out, err = child.communicate(timeout=LIMIT)
    assert (child.returncode, err) == (0, "")
    assert sorted(re.findall(r"rank (\d) of 4", out)) == ["0", "1", "2", "3"]
    assert "started by moe-dist: 4 ranks, 2 on this node; rendezvous at a:29500" in out


@pytest.mark.parametrize(
    ("behaviour", "code", "last"),
    [
        (["sleep", "sleep", "sleep", "raise"], 1, r"rank 3 failed: ValueError: boom of two lines"),
        (["die", "sleep", "sleep", "sleep"], 137, r"rank 0 failed: process \d+ was killed.*"),
        (["lose_peer", "lose_peer", "sleep", "refuse"], 1, r"rank 3 failed: step 3: loss is nan on rank 3"),
        (["sleep", "sleep", "deaf", "exit"], 3, r"rank 3 failed: process \d+ (ended with exit code 3|was killed)"),
    ],
)
def test_a_rank_that_fails_ends_all_machines(config: Path, behaviour: list[str], code: int, last: str) -> None:
    with job(config, *behaviour) as child:
        out, err = child.communicate(timeout=LIMIT)
    assert re.fullmatch(f"moe-dist: {last}", err.splitlines()[-1])
    assert child.returncode in (code, 1)
    assert_none_left(out, 4)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_that_are_asked_to_stop_do_on_all_machines(config: Path, signum: int) -> None:
    with job(config, "stop", "stop") as child:
        started = wait_for_ranks(child, 2)
        child.send_signal(signum)
        _, err = child.communicate(timeout=LIMIT)
    assert (child.returncode, err.splitlines()[-1]) == (75, f"moe-dist: {STOPPED}")
    assert_none_left(started, 2)


def test_ctrl_c_lets_ranks_close_their_files(config: Path) -> None:
    with job(config, "close", "close") as child:
        started = wait_for_ranks(child, 2)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=LIMIT)
    assert (child.returncode, err.splitlines()[-1]) == (130, "moe-dist: interrupted")
    assert sorted(re.findall(r"rank \d closed", out)) == ["rank 0 closed", "rank 1 closed"]
    assert_none_left(started, 2)


def test_no_rank_outlives_the_machine_that_started_it(config: Path) -> None:
    with job(config, "sleep", "sleep") as child:
        started = wait_for_ranks(child, 2)
        child.send_signal(signal.SIGKILL)
        child.wait(LIMIT)
        assert_none_left(started, 2)


def test_a_machine_that_cannot_be_reached_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MOE_DIST_SSH", str(HERE / "fake_ssh.sh"))
    entry = HERE / "fake_rank.py"
    nodes = (Node("a", 1), Node("unreachable", 1))
    outcome = ssh_runner.run(
        Job(Launcher.LOCAL, nodes, (str(config),), entry=entry), {"FAKE_RENDEZVOUS": str(config.parent)}
    )
    assert outcome.exit_code == 1
    assert outcome.line.startswith("error: ssh to unreachable ended without its ranks: the machine cannot be reached")


@pytest.mark.parametrize(
    ("ssh", "message"),
    [("/nowhere/ssh", r"ssh cannot be run \(No such file or directory\)"), ("'ssh", "MOE_DIST_SSH .*No closing quota")],
)
def test_without_ssh_it_is_one_line(config: Path, monkeypatch: pytest.MonkeyPatch, ssh: str, message: str) -> None:
    monkeypatch.setitem(os.environ, "MOE_DIST_SSH", ssh)
    with pytest.raises(LaunchError, match=message):
        ssh_runner.run(Job(Launcher.LOCAL, (Node("a", 1), Node("b", 1)), (str(config),)), {})


def test_an_agent_says_what_it_cannot_start(tmp_path: Path) -> None:
    part = {"command": ["true"], "folder": str(tmp_path / "missing"), "variables": {}, "first_rank": 0, "ranks": 1}
    done = subprocess.run(
        [sys.executable, "-m", "moe_dist.launch.agent"],
        input=json.dumps({**part, "threads": 1}) + "\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    outcome = agent.parse_outcome(done.stderr.splitlines()[-1])
    assert outcome is not None
    assert done.returncode == outcome.exit_code == 2
    assert "No such file or directory" in outcome.line


@pytest.mark.parametrize(
    ("signum", "how", "code"), [(signal.SIGINT, None, 130), (signal.SIGTERM, None, 143), (signal.SIGUSR1, "stop", 75)]
)
def test_an_agent_obeys_what_it_is_told_before_its_job_has_begun(
    config: Path, signum: int, how: str | None, code: int
) -> None:
    asleep = ["sleep", "600"]  # it has no rank that could be asked to stop
    command = (
        asleep if how is None else node_command(Job.here(Launcher.LOCAL, 1, (str(config),), HERE / "fake_rank.py"), 0)
    )
    part = agent.NodeJob(command, str(config.parent), {"RANK_0": how or ""}, 0, 1, 1)
    with subprocess.Popen(
        [sys.executable, "-m", "moe_dist.launch.agent"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        child.stdin.write(f"{json.dumps(asdict(part))}\n{int(signum)}\n")
        child.stdin.flush()  # both in one piece; its end would be an order too
        try:
            assert child.wait(agent.HEARTBEAT_TIMEOUT_SECONDS / 2) == code
        finally:
            child.kill()


def test_what_an_agent_says_last_is_read_back() -> None:
    outcome = JobOutcome(1, "rank 3 failed: x", Fault(3, 1.5, "x", 1))
    said = agent.format_outcome(outcome)
    assert agent.parse_outcome(said) == outcome
    assert agent.parse_outcome("anything else") is None


FAILED = JobOutcome(3, "rank 3 failed: x", Fault(3, 9.0, "x", 3))
LOST = JobOutcome(1, "rank 0 failed: lost", Fault(0, 1.0, "lost", 1, consequence=True))
GONE = JobOutcome(1, "error: ssh to b ended without its ranks")
INTERRUPTED = JobOutcome(129, "interrupted")
ASKED = JobOutcome(75, STOPPED)


@pytest.mark.parametrize(
    ("outcomes", "heard", "found"),
    [
        ([JobOutcome(0), JobOutcome(0)], [], JobOutcome(0)),
        ([LOST, FAILED], [], FAILED),
        ([LOST, GONE], [], GONE),
        ([INTERRUPTED, FAILED], [], FAILED),
        ([INTERRUPTED, FAILED], [signal.SIGINT], JobOutcome(130, "interrupted")),
        ([ASKED, ASKED], [signal.SIGTERM], ASKED),
        ([ASKED, JobOutcome(0)], [], ASKED),
    ],
)
def test_what_the_parts_mean_for_the_job(outcomes: list[JobOutcome], heard: list[int], found: JobOutcome) -> None:
    assert ssh_runner.conclude(outcomes, heard) == found
