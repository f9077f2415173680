"""Facts about this machine that decide values of `auto`, found without torch."""

import os
from importlib import metadata
from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names in the flags of /proc/cpuinfo: x86's, and Arm's last."""


def has_gpu() -> bool:
    """Return whether torch could find a GPU here."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and not _torch_is_cpu_build() and any(Path(device).exists() for device in GPU_DEVICES)


def has_bfloat16() -> bool:
    """Return whether products in bfloat16 are fast here: on a GPU, or by the CPU's own instructions.

    MOE_DIST_ISA, by which tests use this processor as an older one, counts.
    """
    if has_gpu():
        return True
    return os.environ.get("MOE_DIST_ISA", "native") == "native" and not BFLOAT16_INSTRUCTIONS.isdisjoint(_cpu_flags())


def _cpu_flags() -> list[str]:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])


def _torch_is_cpu_build() -> bool:
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
