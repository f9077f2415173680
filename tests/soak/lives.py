"""One life of a run: its ranks start, and either reach the end or are killed on the way."""

import os
import pickle
import signal
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_dist.config import load_config
from moe_dist.training.trainer import train
from tests.distributed.ranks import start_ranks
from tests.soak.disturbances import Disturbance, jumping_clock
from tests.soak.kill_points import PARTS, KillPoint, LineCounter

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"
RANKS = 2
LIMIT_SECONDS = 300.0
PEER_SECONDS = 10.0


@dataclass(frozen=True)
class Life:
    """How it ended.

    Attributes:
        killed: a rank was killed, or all stopped because one was asked to.
        lines: executed in the part of the kill point by each rank that reached the end.
        error: what a rank complained of although nobody was killed.
    """

    finished: bool
    killed: bool
    lines: tuple[int, ...] = ()
    error: str | None = None


def live(
    words: list[str],
    point: KillPoint,
    kill_after: float | None = None,
    grace: float = 0.0,
    signum: signal.Signals = signal.SIGKILL,
    disturbance: Disturbance | None = None,
) -> Life:
    """Trains with these words until the end, or until a rank is killed: at `point`, or after a time.

    Args:
        kill_after: seconds after which the rank of `point` gets the signal.
        grace: how long the other ranks live on after one has been killed, seconds.
        signum: SIGUSR1 and SIGTERM ask all ranks to stop.
    """
    with tempfile.TemporaryDirectory() as folder:
        offset = 0.0 if disturbance is None else disturbance.clock_offset
        processes, pipes = start_ranks(work, RANKS, Path(folder) / "store", LIMIT_SECONDS, words, point, offset)
        started, ended = time.monotonic(), 0.0
        try:
            while any(process.is_alive() for process in processes):
                if any(process.exitcode not in (None, 0) for process in processes):
                    time.sleep(grace)
                    break
                if not all(process.is_alive() for process in processes) and any(pipe.poll() for pipe in pipes):
                    ended = ended or time.monotonic()
                    if time.monotonic() - ended > PEER_SECONDS:
                        break  # a rank ended by an error, and its launcher would end the others
                now = time.monotonic() - started
                if disturbance is not None:
                    disturbance.poll(now, processes)
                if kill_after is not None and now >= kill_after:
                    kill_after = None
                    if processes[point.rank].is_alive():
                        os.kill(processes[point.rank].pid, signum)
                if now > LIMIT_SECONDS:
                    return Life(False, False, error=f"{point}: no end after {LIMIT_SECONDS:g} s")
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()
                process.join()
    answers = [_answer(pipe) for pipe in pipes]
    errors = sorted((error for _, error in answers if error), key=lambda error: "ConnectionError" in error)
    if any(process.exitcode for process in processes) and not (errors and ended):
        return Life(False, True)
    if errors:
        return Life(False, False, error=errors[0])
    stopped = [stopped for (_, stopped), _ in answers]
    if len(set(stopped)) != 1:
        return Life(False, False, error=f"some ranks stopped and others did not: {stopped}")
    return Life(not stopped[0], stopped[0], tuple(lines for (lines, _), _ in answers))


def _answer(pipe: Connection) -> tuple[Any, str | None]:
    """Return what a rank has sent; nothing if it was ended before."""
    try:
        answer: tuple[Any, str | None] = pickle.loads(pipe.recv_bytes() if pipe.poll() else b"")  # noqa: S301
    except (EOFError, OSError):
        return None, None
    return answer


def work(words: list[str], point: KillPoint | None, clock_offset: float = 0.0) -> tuple[int, bool]:
    """One rank: trains, and dies where it is told to; returns the lines it has counted, and whether it was stopped."""
    if clock_offset:
        time.time = jumping_clock(clock_offset)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        if point is None or point.part not in PARTS or (point.count and point.rank != dist.get_rank()):
            return 0, train(load_config(SMOKE, words))
        with LineCounter(point.part, point.count) as counter:
            stopped = train(load_config(SMOKE, words))
    return counter.lines, stopped
