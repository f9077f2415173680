"""Signals that ask a run to stop, each tried in a process of its own."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_dist.training.preemption import StopSignals

ROOT = Path(__file__).parents[3]
HEAD = "import os, signal, sys, time; from moe_dist.training.preemption import StopSignals\n"


def run(code: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", HEAD + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_becomes_a_wish(name: str) -> None:
    done = run(
        f"before = signal.getsignal(signal.{name})\n"  # ignored, where the tests run in the background
        "with StopSignals() as stop:\n"
        "    assert not stop.wanted\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    while not stop.wanted: time.sleep(0.01)\n"
        "print('stops')\n"
        f"assert signal.getsignal(signal.{name}) is before\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stops\n", "")


def test_sigterm_ends_a_rank_that_reaches_no_boundary_even_in_c_code() -> None:
    # a lock that never comes blocks the main thread where no Python handler can run, as a collective does
    blocked = "import ctypes; ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))\n"
    done = run(
        f"with StopSignals(term_seconds=0.2):\n    os.kill(os.getpid(), signal.SIGTERM)\n    while True: {blocked}"
    )
    assert done.returncode == 128 + signal.SIGTERM


def test_a_second_ctrl_c_ends_a_rank_at_once() -> None:
    done = run(
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    while not stop.wanted: time.sleep(0.01)\n"
        "    print('saving', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)\n"
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "saving\n")


def test_once_the_boundary_is_reached_saving_may_take_its_time() -> None:
    done = run(
        "import threading\n"
        "with StopSignals(term_seconds=15) as stop:\n"
        "    before = set(threading.enumerate())\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while not stop.wanted: time.sleep(0.01)\n"
        "    stop.reached()\n"
        "    for waits in set(threading.enumerate()) - before: waits.join()  # or else it ends the process\n"
        "print('saved')\n"
    )
    assert (done.returncode, done.stdout) == (0, "saved\n")


def test_a_signal_that_came_before_is_kept() -> None:
    done = run(
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "with StopSignals() as stop:\n"
        "    while not stop.wanted: time.sleep(0.01)\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_another_thread_may_train_without_hearing_anything() -> None:
    found: list[bool] = []

    def train() -> None:
        with StopSignals() as stop:
            found.append(stop.wanted)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGTERM) is before
