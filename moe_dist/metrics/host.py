"""Facts about the machine and this process, without torch."""

import os
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("moe-dist", "torch", "deepspeed", "megatron-core")


def installed_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that decide a run's figures; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def source_commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """Return the commit of the checkout that this code runs from, with `-dirty` if files differ; None without one."""
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def seconds_since_start(stat: Path = Path("/proc/self/stat")) -> float | None:
    """Return the age of a process in seconds, to 10 ms; None if it has ended or this is not Linux."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    ticks = int(fields[19])  # since boot; the list starts at the third field, after the name
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes.

    Linux's VmHWM, since getrusage's ru_maxrss survives exec: a rank would inherit its launcher's peak.
    """
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rss_bytes() -> int:
    """Return the resident set of this process now (Linux's VmRSS), in bytes; 0 if unavailable."""
    return _status_bytes("VmRSS") or 0


def _status_bytes(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
