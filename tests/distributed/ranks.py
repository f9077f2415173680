"""Runs a function on several gloo ranks of this machine, with a file store and a time limit, and shows every error."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])  # the heavy imports happen once for all tests


def run_ranks(work: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls `work(*args)` on every rank of a fresh process group; returns what each rank returned.

    Raises:
        AssertionError: a rank failed or the time ran out; the message holds every rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = start_ranks(work, ranks, Path(folder) / "store", timeout, *args)
        try:
            outcomes = _collect(pipes, processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
    errors = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(outcomes) if error]
    assert not errors, "\n".join(errors)
    return [result for result, _ in outcomes]


def start_ranks(
    work: Callable[..., Any], ranks: int, store: Path, timeout: float, *args: Any
) -> tuple[list[Any], list[Connection]]:
    """Starts a process for every rank of a group that meets at the file `store`; each answers through its pipe."""
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        CONTEXT.Process(target=_rank, args=(work, rank, ranks, store, timeout, pipe[1], args))
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    return processes, [pipe[0] for pipe in pipes]


def _collect(pipes: list[Connection], processes: list[Any], deadline: float) -> list[tuple[Any, str | None]]:
    outcomes: list[tuple[Any, str | None]] = []
    for pipe, process in zip(pipes, processes, strict=True):
        while not pipe.poll(0.02) and process.is_alive() and time.monotonic() < deadline:
            pass
        if pipe.poll(0):
            outcomes.append(_answer(pipe, process))
        elif process.is_alive():
            outcomes.append((None, "no answer within the time limit"))
        else:
            outcomes.append((None, f"ended with exit code {process.exitcode} before it answered"))
        if outcomes[-1][1]:
            deadline = min(deadline, time.monotonic() + 3)  # the others may hang on this one: hear what they have
    return outcomes


def _answer(pipe: Connection, process: Any) -> tuple[Any, str | None]:
    """What a rank has sent, or that it has closed its end of the pipe without a word."""
    try:
        answer: tuple[Any, str | None] = pickle.loads(pipe.recv_bytes())  # noqa: S301  of our own rank
    except EOFError:
        process.join()
        return None, f"ended with exit code {process.exitcode} before it answered"
    return answer


def _rank(
    work: Callable[..., Any], rank: int, ranks: int, store: Path, timeout: float, pipe: Connection, args: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
        # plain pickle: the pipe's own would share tensors' memory with a process about to end
        pipe.send_bytes(pickle.dumps((work(*args), None)))
        dist.barrier()
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
