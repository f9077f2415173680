"""Launcher of ranks on this machine that needs the standard library alone; `--launcher local` runs it on each node.

    python -m moe_dist.launch.local_launcher --ranks 2 [--first-rank 2 --world-size 4 --rendezvous n1:29500] SCRIPT ...

`supervisor.py` reports which rank failed and why; here the first failure ends the other ranks.
"""

import os
import signal
import subprocess
import sys
import time
from argparse import REMAINDER, ArgumentParser
from types import FrameType

from moe_dist.launch.environment import STARTER

POLL_SECONDS = 0.1
TERMINATE_SECONDS = 20.0  # from a failure until the other ranks are killed


def main() -> int:
    """Start the ranks, wait for all, and return the exit code of the first that failed."""
    parser = ArgumentParser(
        prog="moe_dist.launch.local_launcher", description="Start ranks of a script on this machine."
    )
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks to start here")
    parser.add_argument("--first-rank", type=int, default=0, help="number of the first of them")
    parser.add_argument("--world-size", type=int, help="ranks of the whole job; default: those started here")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="rendezvous address on rank 0's machine")
    parser.add_argument("command", nargs=REMAINDER, help="the script of a rank and its arguments")
    words = parser.parse_args()
    common = {
        STARTER: "local",
        "WORLD_SIZE": str(words.world_size or words.ranks),
        "LOCAL_WORLD_SIZE": str(words.ranks),
    }
    if words.rendezvous:
        common["MASTER_ADDR"], _, common["MASTER_PORT"] = words.rendezvous.rpartition(":")
    running = []
    for local_rank in range(words.ranks):
        place = {"RANK": str(words.first_rank + local_rank), "LOCAL_RANK": str(local_rank)}
        command = [sys.executable, "-u", *words.command]
        running.append(subprocess.Popen(command, env={**os.environ, **common, **place}))

    def stop(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        return _wait(running)
    finally:
        _end(running)


def _wait(running: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in running]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        time.sleep(POLL_SECONDS)


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    for rank in running:
        rank.terminate()
    deadline = time.monotonic() + TERMINATE_SECONDS
    while any(rank.poll() is None for rank in running) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for rank in running:
        rank.kill()


if __name__ == "__main__":
    sys.exit(main())
