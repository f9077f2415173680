"""Worker of the runner: applies mutations in its own copy of the package, one at a time, and runs their tests.

The frameworks are imported once; each mutation's tests run in a fork, so that no test sees modules of another mutation.
Requests are indices of `MUTATIONS` on the standard input, a line each; replies are outcomes on the standard output.
"""

import importlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
OUTCOMES = {0: "survived", 1: "killed"}
"""Outcome by pytest's exit status."""
FRAMEWORKS = ("pytest", "hypothesis", "numpy", "torch", "scipy.optimize", "safetensors", "deepspeed", "megatron.core")


def main(folder: Path, limit: float) -> None:
    """Serve requests until the standard input ends."""
    from tests.mutants.mutations import MUTATIONS

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # frameworks print while they are imported
    for name in FRAMEWORKS:
        importlib.import_module(name)
    for request in sys.stdin:
        mutation = MUTATIONS[int(request)]
        path = folder / "moe_dist" / mutation.file
        text = path.read_text(encoding="utf-8")
        path.write_text(mutation.applied(text), encoding="utf-8")
        try:
            outcome = run_tests(shlex.split(mutation.tests), folder / "output.txt", limit)
        finally:
            path.write_text(text, encoding="utf-8")
        replies.write(outcome + "\n")
        replies.flush()


def run_tests(tests: list[str], output: Path, limit: float) -> str:
    """Run pytest in a fork until the first failure, and return the outcome."""
    child = os.fork()
    if child == 0:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = 3
        try:
            import pytest

            words = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore", *tests]
            status = int(pytest.main(words))
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + limit
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "killed by the time limit"
        time.sleep(0.05)
    outcome = OUTCOMES.get(os.waitstatus_to_exitcode(status), "broken")
    if outcome == "broken":
        sys.stderr.write(output.read_text(errors="replace")[-2000:])
    return outcome


if __name__ == "__main__":
    main(Path.cwd(), float(sys.argv[1]))
