"""C operators compiled on demand with the system's compiler, and None where that is not possible.

A library is kept in a private folder of the user's cache, named by the hash of all it depends on: source, flags,
compiler and the processor's features (a home may be shared by unlike nodes). Ranks that start together are safe: one
compiles under a file lock, and a finished library appears by an atomic rename. Nothing here raises for want of a
compiler; a warning says once why the torch backend is used instead. `MOE_DIST_NATIVE=0` turns all of it off, and
`MOE_DIST_ISA=avx2|sse4|scalar` compiles for an older x86 processor than this one, for tests.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_FLAGS = (
    *("-O3", "-w", "-shared", "-fPIC", "-std=gnu11"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_X86_FLAGS = ("-mprefer-vector-width=512",)
_ISA_FLAGS = {
    "native": ("-march=native",),
    "avx2": ("-march=x86-64-v3",),
    "sse4": ("-march=x86-64-v2",),
    "scalar": ("-march=x86-64", "-DSCALAR", "-fno-tree-vectorize"),
}
"""By the value of MOE_DIST_ISA; all but native exist on x86 only."""
_TIMEOUT_SECONDS = 120
_logger = logging.getLogger(__name__)


def enabled() -> bool:
    """Whether the environment allows compiled operators."""
    return os.environ.get("MOE_DIST_NATIVE", "1") != "0"


def _isa_flags() -> tuple[str, ...]:
    """Return the compiler's words for the vectors to use.

    Raises:
        OSError: MOE_DIST_ISA has another value than those of `_ISA_FLAGS`.
    """
    isa = os.environ.get("MOE_DIST_ISA", "native")
    if isa not in _ISA_FLAGS:
        raise OSError(f"MOE_DIST_ISA={isa} is not one of {', '.join(_ISA_FLAGS)}")
    return _ISA_FLAGS[isa] + (_X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())


@functools.cache
def library(source: Path, defines: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library of one C file compiled with `-D` for each of `defines`, or None if this machine cannot have it."""
    try:
        return ctypes.CDLL(str(_compiled(source, defines)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        detail = getattr(error, "stderr", None) or error
        text = detail.decode(errors="replace") if isinstance(detail, bytes) else str(detail)
        _logger.warning("%s is not compiled, torch is used instead: %s", source.name, text.strip()[:500])
        return None


def _compiled(source: Path, defines: tuple[str, ...]) -> Path:
    command = [_compiler(), *_FLAGS, *_isa_flags(), *(f"-D{name}" for name in defines)]
    folder = _cache_folder()
    target = folder / f"{source.stem}-{_key(source, command)}.so"
    if target.exists():
        return target
    with (folder / f"{target.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: several ranks compile, each renames the same
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile([*command, str(source)], target)
    return target


def _compile(command: list[str], target: Path) -> None:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".part")
    os.close(descriptor)
    try:
        subprocess.run([*command, "-o", name], check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise OSError("no C compiler (CC, cc, gcc, clang)")


def _key(source: Path, command: list[str]) -> str:
    version = subprocess.run(
        [command[0], "--version"], check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
    ).stdout
    parts = (source.read_text(), *command, version, platform.machine(), _processor_features())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor_features() -> str:
    """What `-march=native` looks at, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def _cache_folder() -> Path:
    """A folder only this user can write: a library found there is code that will run."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "moe-dist" / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} can be written by other users: make it private (chmod 700)")
    return folder
