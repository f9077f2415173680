"""A main thread that hangs, also in C with Python's lock held, leaves its stack and ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_dist.config import load_config
from moe_dist.training.watchdog import Pauses, Watchdog, watched_seconds

ROOT = Path(__file__).parents[3]
HANG = """
import ctypes, sys, time
from pathlib import Path
from moe_dist.training.watchdog import Watchdog, end_process

def in_python():
    time.sleep(60)

def in_c():
    ctypes.PyDLL(None).sleep(60)  # keeps Python's lock

def in_a_collective():
    in_python.__code__ = in_python.__code__.replace(co_filename="/x/torch/distributed/c10d.py")
    in_python()

run = Path(sys.argv[1])
with Watchdog(0.5, run, 3, end_process, events=run / "events.jsonl") as watchdog:
    for step in range(3):
        watchdog.alive(f"step {step}")
    globals()[sys.argv[2]]()
"""


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("in_python", "no progress for 0.5 s since step 2: this rank hangs in"),
        ("in_a_collective", "no progress for 0.5 s since step 2: this rank waits for another rank in"),
        ("in_c", "no progress for 0.5 s since step 2: this rank hangs outside of Python's code"),
    ],
)
def test_what_hangs_is_ended_and_its_stack_kept(tmp_path: Path, where: str, said: str) -> None:
    command = [sys.executable, "-c", HANG, str(tmp_path), where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (-signal.SIGKILL if where == "in_c" else 1)  # only another process can end that one
    assert said in done.stderr
    stacks = (tmp_path / "stacks" / "rank-00003.txt").read_text()
    if where == "in_c":
        event = json.loads((tmp_path / "events.jsonl").read_text())
        assert (event["event"], event["step"]) == ("failed", 0)
        assert event["error"] in done.stderr
    assert where.replace("in_a_collective", "in_python") in stacks


WORK = """
import sys, time
from pathlib import Path
from moe_dist.training.watchdog import Watchdog, end_process

with Watchdog(0.5, Path(sys.argv[1]), 3, end_process, on_pause=lambda seconds: print("paused", flush=True)) as watchdog:
    print("ready", flush=True)
    for line in sys.stdin:
        watchdog.alive(line.strip())
        print(line, end="", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no Linux")
def test_a_process_that_was_suspended_goes_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORK, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(6)  # longer than the watchdog and its guard process wait
        os.kill(child.pid, signal.SIGCONT)
        time.sleep(0.2)  # for the watchdog's thread to see the gap
        child.stdin.write("step 1\n")
        child.stdin.close()
        assert child.stdout.read() == "paused\nstep 1\n"
        assert child.wait(30) == 0
    assert list(tmp_path.iterdir()) == []


def test_gaps_between_ticks_are_pauses() -> None:
    now = iter([100.0, 102.0, 104.5, 3704.5, 3706.0])
    pauses = Pauses(2.0, lambda: next(now))
    assert [pauses.take() for _ in range(4)] == [0.0, 0.5, 3598.0, 0.0]


def test_nothing_is_left_where_all_went_well(tmp_path: Path) -> None:
    def never(error: Exception) -> None:
        raise AssertionError(error)

    for seconds in (0, 60):
        with Watchdog(seconds, tmp_path, 0, never) as watchdog:
            watchdog.alive("something")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "seconds"),
    [([], 300), (["world.timeout_seconds=40"], 20), (["watchdog.seconds=7"], 7), (["watchdog.seconds=0"], 0)],
)
def test_the_time_stays_below_that_of_collectives(words: list[str], seconds: float) -> None:
    assert watched_seconds(load_config(None, words)) == seconds
