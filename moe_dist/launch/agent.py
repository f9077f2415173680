"""Agent of a multi-machine job: started on each machine over ssh, it runs a launcher and supervises its ranks.

`ssh_runner.py` communicates with it through ssh's own streams, without a port, a secret, or words that a shell would
have to quote. Standard input: the first line is the job; each later line is a signal number to forward to the ranks, or
empty (a heartbeat). When the stream ends or stays silent, everything that the agent started ends. The last line on
standard error is the outcome.
"""

import json
import os
import select
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from types import FrameType

from moe_dist.config.machine import has_gpu
from moe_dist.errors import EXIT_REFUSED, LaunchError
from moe_dist.launch import faults
from moe_dist.launch.environment import prepare_process
from moe_dist.launch.supervisor import FORWARDED_SIGNALS, JobOutcome, run_job

HEARTBEAT_SECONDS = 5.0
HEARTBEAT_TIMEOUT_SECONDS = 60.0  # without a heartbeat, after which the starting machine counts as lost
OUTCOME = "moe-dist-outcome "  # prefix of the outcome's JSON


@dataclass(frozen=True)
class NodeJob:
    """Part of a job that one machine runs.

    Attributes:
        command: command of the launcher on this machine.
        folder: working directory.
        variables: additional environment variables.
        first_rank, ranks: first rank of this machine, and how many there are.
        threads: CPU threads per rank; 0: the cores are divided among the ranks.
        fork_ranks: ranks are forked from one process of this machine, unless it has a GPU.
    """

    command: list[str]
    folder: str
    variables: dict[str, str]
    first_rank: int
    ranks: int
    threads: int
    fork_ranks: bool = False


def main() -> int:
    """Read the job, run it to its end and print its outcome."""
    for signum in FORWARDED_SIGNALS:
        signal.signal(signum, _ignore)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)  # pending until the supervisor installs its handlers
    orders = sys.stdin.fileno()
    part = NodeJob(**json.loads(_read_line(orders)))
    environment = {**os.environ, **part.variables}
    prepare_process(environment, part.threads, part.ranks)
    threading.Thread(target=_handle_orders, args=(orders,), name="orders", daemon=True).start()
    try:
        os.chdir(part.folder)
        ranks = range(part.first_rank, part.first_rank + part.ranks)
        fork = part.fork_ranks and not has_gpu()
        outcome = run_job(part.command, environment, ranks, rendezvous_file=False, fork_ranks=fork)
    except (OSError, LaunchError) as error:
        outcome = JobOutcome(EXIT_REFUSED, faults.describe(error))
    print(format_outcome(outcome), file=sys.stderr, flush=True)
    return outcome.exit_code


def _handle_orders(orders: int) -> None:
    """Turn orders into signals to this process, which its supervisor handles; the end of the orders ends the job."""
    while line := _read_line(orders):
        if line.strip():
            os.kill(os.getpid(), int(line))
    os.kill(os.getpid(), signal.SIGHUP)


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Ignore a signal: after the end of the job its outcome must still be printed."""


def _read_line(orders: int) -> bytes:
    """Return one line; empty if the stream has ended or has been silent for too long."""
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([orders], [], [], HEARTBEAT_TIMEOUT_SECONDS)
        byte = os.read(orders, 1) if readable else b""
        if not byte:
            return b""
        line += byte
    return line


def format_outcome(outcome: JobOutcome) -> str:
    """Return the outcome of a part as one line."""
    return OUTCOME + json.dumps(asdict(outcome))


def parse_outcome(line: str) -> JobOutcome | None:
    """Return the outcome that a line holds; None for any other line."""
    if not line.startswith(OUTCOME):
        return None
    found = json.loads(line.removeprefix(OUTCOME))
    fault = found["fault"] and faults.Fault(**found["fault"])
    return JobOutcome(found["exit_code"], found["line"], fault)


if __name__ == "__main__":
    sys.exit(main())
