"""When a rank fails: all stop, nothing is left behind, and the last line names the rank and its error."""

import errno
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_dist.errors import LaunchError
from moe_dist.launch import supervisor as supervise
from moe_dist.launch.processes import wait_status

JOB = Path(__file__).with_name("run_fake_job.py")
LIMIT = 120.0  # seconds; a busy machine is slow to start ranks


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("train: {global_batch_size: 12}\n")  # for 1 to 4 ranks
    return path


@contextmanager
def job(who: str, config: Path, *behaviour: str) -> Iterator[subprocess.Popen[str]]:
    """A supervised job, one rank for each word of `behaviour`."""
    words = {f"RANK_{rank}": how for rank, how in enumerate(behaviour)}
    command = [sys.executable, str(JOB), who, str(len(behaviour)), str(config)]
    with subprocess.Popen(
        command, env={**os.environ, **words}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def wait_for_ranks(child: subprocess.Popen[str], count: int) -> str:
    """What the ranks say of themselves once they are watched, one line each; rank 0 also says who started them."""
    assert child.stdout is not None
    lines: list[str] = []
    while "".join(lines).count(" pid ") < count:  # unbuffered ranks may share a line
        lines.append(child.stdout.readline())
        assert lines[-1], f"the job ended: {lines}"
    return "".join(lines)


def assert_none_left(text: str, count: int) -> None:
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", text)]
    assert len(pids) == count
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("who", "behaviour", "code", "last"),
    [
        ("stop", ["sleep", "raise", "sleep"], 1, r"rank 1 failed: ValueError: boom of two lines"),
        ("stop", ["refuse", "sleep"], 1, r"rank 0 failed: step 3: loss is nan on rank 0"),
        ("stop", ["sleep", "sleep", "die"], 137, r"rank 2 failed: process \d+ was killed( by signal 9 \(SIGKILL\))?"),
        ("stop", ["exit", "sleep"], 3, r"rank 0 failed: process \d+ (ended with exit code 3|was killed)"),
        ("stop", ["lose_peer", "lose_peer", "raise"], 1, r"rank 2 failed: ValueError: boom of two lines"),
        ("ignore", ["terminate", "lose_peer"], 143, r"rank 0 failed: process \d+ was killed.*"),
        ("ignore", ["lose_peer", "die", "lose_peer"], 137, r"rank 1 failed: process \d+ was killed.*"),
        ("ignore", ["sleep", "raise", "deaf"], 1, r"rank 1 failed: ValueError: boom of two lines"),
        ("deepspeed", ["sleep", "raise", "sleep", "sleep"], 1, r"rank 1 failed: ValueError: boom of two lines"),
        ("deepspeed", ["sleep", "sleep", "sleep", "die"], 137, r"rank 3 failed: process \d+ was killed.*"),
        ("local", ["sleep", "raise"], 1, r"rank 1 failed: ValueError: boom of two lines"),
        ("local", ["die", "sleep"], 137, r"rank 0 failed: process \d+ was killed.*"),
        ("torchrun", ["sleep", "raise"], 1, r"rank 1 failed: ValueError: boom of two lines"),
        ("torchrun", ["die", "sleep"], 137, r"rank 0 failed: process \d+ was killed.*"),
    ],
)
def test_one_rank_fails(config: Path, who: str, behaviour: list[str], code: int, last: str) -> None:
    with job(who, config, *behaviour) as child:
        out, err = child.communicate(timeout=LIMIT)
    assert re.fullmatch(f"moe-dist: {last}", err.splitlines()[-1])
    assert child.returncode in (code, 1)  # how a rank was killed may be past finding out
    assert err.count("Traceback (most recent call last)") <= 1 or who == "torchrun"
    assert_none_left(out, len(behaviour))


def test_those_the_launcher_terminated_are_not_the_cause_even_if_all_are_seen_at_once(config: Path) -> None:
    with job("stop", config, "sleep", "sleep", "sleep") as child:
        started = wait_for_ranks(child, 3)
        pids = dict(re.findall(r"rank (\d) of 3 pid (\d+)", started))
        child.send_signal(signal.SIGSTOP)
        os.kill(int(pids["2"]), signal.SIGKILL)
        assert_none_left(started, 3)
        child.send_signal(signal.SIGCONT)
        _, err = child.communicate(timeout=LIMIT)
    if not tells_after_waiting():
        pytest.skip("this kernel does not tell how a process ended once its parent has waited for it")
    assert err == f"moe-dist: rank 2 failed: process {pids['2']} was killed by signal 9 (SIGKILL)\n"
    assert child.returncode == 137


def tells_after_waiting() -> bool:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as child:
        descriptor = os.pidfd_open(child.pid)
        child.wait(LIMIT)
    status = wait_status(descriptor, child.pid)
    os.close(descriptor)
    assert status in (None, 3 << 8)
    return status is not None


def test_what_we_wait_for_is_less_than_thirty_seconds() -> None:
    assert supervise.GRACE_SECONDS + 2 * supervise.TERMINATE_SECONDS < 30


def test_a_kernel_without_pidfd_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    with pytest.raises(LaunchError, match=r"pidfd_open.*Function not implemented.*Linux 5\.3"):
        supervise.run_job([sys.executable, "-c", ""], os.environ, range(1), rendezvous_file=False)


@pytest.mark.parametrize("who", ["stop", "local", "torchrun"])
def test_all_succeed(config: Path, who: str) -> None:
    with job(who, config, "succeed", "succeed") as child:
        out, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 0
    assert err == ""
    assert sorted(re.findall(r"rank (\d) of 2", out)) == ["0", "1"]


@pytest.mark.parametrize("who", ["stop", "local", "deepspeed", "torchrun"])
def test_ctrl_c_lets_ranks_close_their_files(config: Path, who: str) -> None:
    with job(who, config, "close", "close") as child:
        started = wait_for_ranks(child, 2)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 130
    assert sorted(re.findall(r"rank \d closed", out)) == ["rank 0 closed", "rank 1 closed"]
    assert err.splitlines()[-1] == "moe-dist: interrupted"
    assert "Traceback" not in err
    assert_none_left(started, 2)


def test_a_signal_reaches_a_rank_once_also_while_the_rank_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rank-0.pid").write_text(f'{{"pid": {os.getpid()}, "group": {os.getpgrp()}}}')
    supervised, sent = supervise._SupervisedJob(tmp_path, [0]), []
    monkeypatch.setattr(supervise, "_send", lambda rank, signum: sent.append((rank.rank, signum)))

    class InterruptedPoll:
        def register(self, descriptor: int, mask: int) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)  # as a user may at this very moment
            os.close(descriptor)

        def poll(self, timeout: float) -> list[tuple[int, int]]:
            return []

    supervised._poller = InterruptedPoll()  # type: ignore[assignment]
    with supervise._forward_signals(supervised):
        supervised._poll(0.0)
    assert sent == [(0, signal.SIGUSR1)]


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_that_are_asked_to_stop_end_the_job_as_stopped(config: Path, signum: int) -> None:
    with job("local", config, "stop", "stop") as child:
        started = wait_for_ranks(child, 2)
        child.send_signal(signum)
        _, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 75
    assert err.splitlines()[-1] == f"moe-dist: {supervise.STOPPED}"
    assert_none_left(started, 2)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_rank_outlives_its_supervisor(config: Path, signum: int, code: int) -> None:
    with job("ignore", config, "sleep", "sleep") as child:
        started = wait_for_ranks(child, 2)
        child.send_signal(signum)
        assert child.wait(LIMIT) == code
        assert_none_left(started, 2)


def test_no_rank_outlives_a_launcher_that_vanishes(config: Path) -> None:
    with job("vanish", config, "sleep", "sleep") as child:
        out, err = child.communicate(timeout=LIMIT)
    assert child.returncode != 0
    assert err.splitlines()[-1].startswith("moe-dist: ")
    assert_none_left(out, 2)


def test_a_refusal_is_said_once(tmp_path: Path) -> None:
    with job("stop", tmp_path / "nowhere.yaml", "succeed", "succeed") as child:
        _, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 2
    assert err.count("nowhere.yaml: cannot be read") == 1
    assert re.fullmatch(r"moe-dist: rank \d failed: .*nowhere.yaml: cannot be read.*", err.splitlines()[-1])


def test_rank_0_writes_to_the_terminal_through_deepspeed(config: Path) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, str(JOB), "deepspeed", "1", str(config)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=terminal) as child:
        assert child.wait(LIMIT) == 0
    os.close(terminal)
    assert select.select([controller], [], [], 1)[0]
    assert b"tty True" in os.read(controller, 4096)
    os.close(controller)
