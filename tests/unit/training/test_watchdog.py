"""A main thread that hangs, also in C with Python's lock held, leaves its stack and ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.config import load_config
from moe_dist.training.watchdog import Watchdog, watched_seconds

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

with Watchdog(0.5, Path(sys.argv[1]), 3, end_process) as watchdog:
    for step in range(3):
        watchdog.alive(f"step {step}")
    globals()[sys.argv[2]]()
"""


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("in_python", "no progress for 0.5 s since step 2: this rank hangs in"),
        ("in_a_collective", "no progress for 0.5 s since step 2: this rank waits for another rank in"),
        ("in_c", ""),
    ],
)
def test_what_hangs_is_ended_and_its_stack_kept(tmp_path: Path, where: str, said: str) -> None:
    command = [sys.executable, "-c", HANG, str(tmp_path), where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    stacks = (tmp_path / "stacks" / "rank-00003.txt").read_text()
    assert where.replace("in_a_collective", "in_python") in stacks


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
