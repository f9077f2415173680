"""What a process can say about the machine it runs on, without torch."""

import os
import platform
import resource
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("moe-dist", "torch", "deepspeed", "megatron-core")


def installed_versions() -> dict[str, str | None]:
    """Version of Python and of each package that decides a run's figures; null where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def process_seconds() -> float | None:
    """How long ago this process was started, its interpreter and imports included, to 10 ms; None where not Linux."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot; fields from the third on, after the name
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux's VmHWM, since getrusage's ru_maxrss survives exec: a rank would inherit its launcher's peak.
    """
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rss_bytes() -> int:
    """Resident set of this process now (Linux's VmRSS), in bytes; 0 where the system does not tell."""
    return _status_bytes("VmRSS") or 0


def _status_bytes(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
