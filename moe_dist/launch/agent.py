"""The part of a job on one of several machines: started there over ssh, runs a launcher and watches its ranks.

`fleet.py` talks to it through ssh's own streams, so there is no port, no secret and no quoting of words: the first line
of standard input is the job, each later one a signal's number to pass on to the ranks, or empty: a sign of life. When
the stream ends or falls silent, so does everything that was started here. The last line on standard error tells how.
"""

import json
import os
import select
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from types import FrameType

from moe_dist.errors import EXIT_REFUSED, LaunchError
from moe_dist.launch import faults
from moe_dist.launch.environment import prepare_process
from moe_dist.launch.supervisor import HEARD, JobOutcome, run_job

SIGN_OF_LIFE_SECONDS = 5.0
SILENCE_SECONDS = 60.0  # after which the machine that started us counts as lost
OUTCOME = "moe-dist-outcome "  # before the JSON of how it ended


@dataclass(frozen=True)
class NodeJob:
    """What one machine is to do.

    Attributes:
        command: of the launcher, for this machine.
        folder: where to run it.
        variables: what to set in the environment.
        first_rank, ranks: the ranks that it starts.
        threads: CPU threads a rank; 0: the cores shared among them.
    """

    command: list[str]
    folder: str
    variables: dict[str, str]
    first_rank: int
    ranks: int
    threads: int


def main() -> int:
    """Reads the job and sees it to its end."""
    for signum in HEARD:
        signal.signal(signum, _nothing_runs)
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # kept until the job can hear them
    orders = sys.stdin.fileno()
    part = NodeJob(**json.loads(_read_line(orders)))
    environment = {**os.environ, **part.variables}
    prepare_process(environment, part.threads, part.ranks)
    threading.Thread(target=_obey, args=(orders,), name="orders", daemon=True).start()
    try:
        os.chdir(part.folder)
        ranks = range(part.first_rank, part.first_rank + part.ranks)
        outcome = run_job(part.command, environment, ranks, rendezvous_file=False)
    except (OSError, LaunchError) as error:
        outcome = JobOutcome(EXIT_REFUSED, faults.describe(error))
    print(say_outcome(outcome), file=sys.stderr, flush=True)
    return outcome.exit_code


def _obey(orders: int) -> None:
    """Turns orders into signals to this very process, whose supervisor hears them; the end of orders ends all."""
    while line := _read_line(orders):
        if line.strip():
            os.kill(os.getpid(), int(line))
    os.kill(os.getpid(), signal.SIGHUP)


def _nothing_runs(signum: int, frame: FrameType | None) -> None:
    """Once the job has ended no signal may keep us from saying how."""


def _read_line(orders: int) -> bytes:
    """One line, or nothing where the stream has ended or has been silent for too long."""
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([orders], [], [], SILENCE_SECONDS)
        byte = os.read(orders, 1) if readable else b""
        if not byte:
            return b""
        line += byte
    return line


def say_outcome(outcome: JobOutcome) -> str:
    """The line that tells how a part has ended."""
    return OUTCOME + json.dumps(asdict(outcome))


def read_outcome(line: str) -> JobOutcome | None:
    """How a part has ended, from the line in which it says so; None for any other line."""
    if not line.startswith(OUTCOME):
        return None
    said = json.loads(line.removeprefix(OUTCOME))
    fault = said["fault"] and faults.Fault(**said["fault"])
    return JobOutcome(said["exit_code"], said["line"], fault)


if __name__ == "__main__":
    sys.exit(main())
