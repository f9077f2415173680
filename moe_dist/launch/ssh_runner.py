"""Job on several machines over ssh, one agent on each; when a rank fails anywhere, all ranks end everywhere.

DeepSpeed's own multi-node runner leaves the ranks of other machines running when one exits, and passes words to remote
shells unquoted; here a machine receives its part as JSON through ssh's standard input (`agent.py`).
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from moe_dist.errors import EXIT_FAILURE, EXIT_STOPPED, LaunchError
from moe_dist.launch import commands, faults
from moe_dist.launch.agent import HEARTBEAT_SECONDS, NodeJob, parse_outcome
from moe_dist.launch.environment import split_words
from moe_dist.launch.job import Job
from moe_dist.launch.supervisor import GRACE_SECONDS, POLL_SECONDS, TERMINATE_SECONDS, JobOutcome

SSH = "MOE_DIST_SSH"
SSH_OPTIONS = [
    word
    for option in ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=5", "ServerAliveCountMax=4")
    for word in ("-o", option)
]
STOP_SECONDS = 2 * TERMINATE_SECONDS + 4.0  # time for an agent to end its ranks


def ssh_command(host: str) -> list[str]:
    """Return the command that starts the agent on a host by this Python's path; MOE_DIST_SSH may name another ssh."""
    ssh = split_words(SSH, os.environ.get(SSH, "")) or ["ssh", *SSH_OPTIONS]
    return [*ssh, host, f"exec {shlex.join([sys.executable, '-m', 'moe_dist.launch.agent'])}"]


def run(job: Job, variables: Mapping[str, str]) -> JobOutcome:
    """Run a job of several machines to its end; leave no process on any machine that can be reached.

    Args:
        variables: environment variables for every machine.

    Raises:
        LaunchError: there is no ssh, or MOE_DIST_SSH cannot be parsed.
    """
    parts: list[_RemoteAgent] = []
    try:
        parts.extend(_RemoteAgent(job, number, variables) for number in range(len(job.nodes)))
        with _forward_signals(parts) as received:
            _watch(parts)
    finally:
        for part in parts:
            part.stop()
        for part in parts:
            part.kill()
    return conclude([part.outcome() for part in parts], received)


class _RemoteAgent:
    """Connection to the agent of one machine."""

    def __init__(self, job: Job, number: int, variables: Mapping[str, str]) -> None:
        self.host = job.nodes[number].host or ""
        self._outcome: JobOutcome | None = None
        command, ranks = commands.node_command(job, number), job.ranks_of(number)
        part = NodeJob(command, str(Path.cwd()), dict(variables), ranks.start, len(ranks), job.threads, job.can_fork)
        try:
            self._ssh = subprocess.Popen(
                ssh_command(self.host), stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise LaunchError(f"ssh cannot be run ({error.strerror}): jobs on several machines need it") from error
        self._listener = threading.Thread(target=self._listen, name=f"listen to {self.host}", daemon=True)
        self._listener.start()
        self.send(json.dumps(asdict(part)))

    def send(self, line: str = "") -> None:
        """Send the agent one line; do nothing if it has ended."""
        assert self._ssh.stdin is not None
        with suppress(OSError, ValueError):  # ValueError: closed by stop()
            self._ssh.stdin.write(f"{line}\n".encode())
            self._ssh.stdin.flush()

    def stop(self) -> None:
        """Close the agent's input, at which it ends everything that it started."""
        assert self._ssh.stdin is not None
        with suppress(OSError):
            self._ssh.stdin.close()

    def poll(self) -> int | None:
        return self._ssh.poll()

    def kill(self) -> None:
        """End the connection; an agent that is still running ends its ranks by itself."""
        self.stop()
        with suppress(subprocess.TimeoutExpired):
            self._ssh.wait(STOP_SECONDS)
        self._ssh.kill()

    def outcome(self) -> JobOutcome:
        """Return the outcome of the part after its ssh has ended."""
        code = self._ssh.wait()
        self._listener.join(TERMINATE_SECONDS)
        if self._outcome is not None:
            return self._outcome
        why = "the machine cannot be reached, or was lost" if code == 255 else f"exit code {code}"
        return JobOutcome(EXIT_FAILURE, f"error: ssh to {self.host} ended without its ranks: {why}")

    def _listen(self) -> None:
        """Forward the agent's standard error, except for its last line, the outcome."""
        assert self._ssh.stderr is not None
        for line in self._ssh.stderr:
            text = line.decode(errors="replace")
            outcome = parse_outcome(text)
            if outcome is None:
                sys.stderr.write(text)
                sys.stderr.flush()
            else:
                self._outcome = outcome


def _watch(parts: list[_RemoteAgent]) -> None:
    """Wait until all parts have ended; after a first failure, at most some seconds."""
    deadline: float | None = None
    last_heartbeat = time.monotonic()
    while any(part.poll() is None for part in parts):
        now = time.monotonic()
        if deadline is None and any(part.poll() for part in parts):
            deadline = now + GRACE_SECONDS
        if deadline is not None and now >= deadline:
            return
        if now - last_heartbeat >= HEARTBEAT_SECONDS:
            last_heartbeat = now
            for part in parts:
                part.send()
        time.sleep(POLL_SECONDS)


@contextmanager
def _forward_signals(parts: list[_RemoteAgent]) -> Iterator[list[int]]:
    """Forward signals to all machines; a second one that ends jobs ends the parts. Yield the signals received."""
    received: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGUSR1:
            received.append(signum)
        for part in parts:
            part.stop() if len(received) > 1 or signum == signal.SIGHUP else part.send(str(signum))

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {signum: signal.signal(signum, handle) for signum in signals}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # the process that started this one may have blocked them
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def conclude(outcomes: list[JobOutcome], received: list[int]) -> JobOutcome:
    """Combine the outcomes of the parts: the fault that the others follow from, else the first failure."""
    known = [outcome.fault for outcome in outcomes if outcome.fault is not None]
    cause = faults.root_cause(known)
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    silent = [outcome for outcome in failed if outcome.fault is None and outcome.line.startswith("error")]
    if failed and all(outcome.exit_code == EXIT_STOPPED for outcome in failed):
        return failed[0]
    if received and failed:
        return JobOutcome(128 + received[0], "interrupted")
    if silent and (cause is None or cause.consequence):
        return silent[0]
    if cause is not None:
        return next(outcome for outcome in outcomes if outcome.fault == cause)
    return failed[0] if failed else JobOutcome(0)
