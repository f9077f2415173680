"""Runs in processes of their own; summaries are kept under a hash of configuration and code."""

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_dist import __version__
from moe_dist.config import RunConfig, dump_config

PACKAGE = Path(__file__).parents[1]
Summary = dict[str, Any]


@functools.cache
def source_digest(package: Path) -> str:
    """Return a hash of all Python and C files under `package`, by path and content."""
    digest = hashlib.sha256()
    for file in sorted(file for suffix in ("py", "c") for file in package.rglob(f"*.{suffix}")):
        digest.update(f"{file.relative_to(package)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def result_file(folder: Path, name: str, config: RunConfig, package: Path = PACKAGE) -> Path:
    """Return the file of a run's summary; another configuration or other code has another file."""
    key = hashlib.sha256(f"{dump_config(config)}\n{__version__} {source_digest(package)}".encode())
    return folder / f"{name}-{key.hexdigest()[:8]}.json"


def run(command: Sequence[str], seconds: float | None = None) -> str | None:
    """Run a command with one thread per process; return the last line of its error, None after success."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"took longer than {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def run_once(file: Path, command: Sequence[str], seconds: float | None = None) -> tuple[Summary | None, str | None]:
    """Return the summary in a file, after running the command that writes it if there is none.

    Returns:
        The summary and None, or None and the reason why there is none.
    """
    problem = None
    if (summary := read_summary(file)) is None:
        problem = run(command, seconds)
        summary = read_summary(file)
    return summary, None if summary else problem or "it left no summary"


def read_summary(file: Path) -> Summary | None:
    """Return a complete summary; None without one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
