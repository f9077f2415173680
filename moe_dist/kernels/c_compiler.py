"""Just-in-time compilation of C operators with the system's compiler.

A compiled library is cached in a private folder of the user's cache directory. Its name contains a hash of the source,
the flags, the compiler version and the processor's features, because nodes with different processors may share the
directory. Concurrent ranks are safe: one compiles under a file lock, and the finished library is renamed atomically.
A failed compilation does not raise: a warning is logged once with the reason, and a torch backend is used instead.

Environment variables: `MOE_DIST_NATIVE=0` disables compiled operators. `MOE_DIST_ISA=avx2|sse4|scalar` compiles for an
older x86 processor than this one, for tests.
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
"""Compiler flags by the value of MOE_DIST_ISA; only `native` is available on processors other than x86."""
_TIMEOUT_SECONDS = 120
_logger = logging.getLogger(__name__)


def enabled() -> bool:
    """Return True if the environment allows compiled operators."""
    return os.environ.get("MOE_DIST_NATIVE", "1") != "0"


def _isa_flags() -> tuple[str, ...]:
    """Return the compiler flags that select the vector instructions.

    Raises:
        OSError: MOE_DIST_ISA is not a key of `_ISA_FLAGS`.
    """
    isa = os.environ.get("MOE_DIST_ISA", "native")
    if isa not in _ISA_FLAGS:
        raise OSError(f"MOE_DIST_ISA={isa} is not one of {', '.join(_ISA_FLAGS)}")
    return _ISA_FLAGS[isa] + (_X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())


@functools.cache
def library(source: Path, defines: tuple[str, ...]) -> ctypes.CDLL | None:
    """Compile and load one C file with `-D` for each of `defines`; return None if that fails on this machine."""
    try:
        return ctypes.CDLL(str(_compiled(source, defines)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
        detail = getattr(error, "stderr", None) or error
        text = detail.decode(errors="replace") if isinstance(detail, bytes) else str(detail)
        _logger.warning("%s is not compiled, torch is used instead: %s", source.name, text.strip()[:500])
        return None


def _compiled(source: Path, defines: tuple[str, ...]) -> Path:
    command = [_compiler(), *_FLAGS, *_isa_flags(), *(f"-D{name}" for name in defines)]
    folder = cache_folder("native")
    target = folder / f"{source.stem}-{_key(source, command)}.so"
    if target.exists():
        return target
    with (folder / f"{target.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # no file locks: ranks compile the same library, harmless
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
    parts = (source.read_text(), *command, version, platform.machine(), processor_features())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def processor_features() -> str:
    """Return the processor's model and instruction sets, which determine the code that `-march=native` generates."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


def cache_folder(name: str) -> Path:
    """Return a cache folder; other users must not be able to write it, since code in it is executed.

    Raises:
        OSError: another user can write the folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "moe-dist" / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} can be written by other users: make it private (chmod 700)")
    return folder
