"""Facts about this machine that decide values of `auto`, found without torch."""

import os
import platform
from importlib import metadata
from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
GIVEN_GPUS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names in the flags of /proc/cpuinfo: x86's, and Arm's last."""


def has_gpu() -> bool:
    """Return whether torch could find a GPU here."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and not _torch_is_cpu_build() and any(Path(device).exists() for device in GPU_DEVICES)


def unused_gpus() -> str | None:
    """Return why GPUs of this machine, or that a scheduler has given, are not used; None: there are none, or they are.

    A user who asks for the CPU by `world.backend=gloo` is not to be asked.
    """
    given = any(os.environ.get(name, "0") not in ("", "0") for name in GIVEN_GPUS)
    if not given and not any(Path(device).exists() for device in GPU_DEVICES):
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them"
    if os.environ.get("DS_ACCELERATOR") == "cpu" and not _torch_is_cpu_build():
        return "DS_ACCELERATOR=cpu is set"
    return "this torch is built for the CPU" if _torch_is_cpu_build() else "torch finds none: see `moe-dist doctor`"


def processor_name() -> str:
    """Return the name of this machine's CPU."""
    names = [line for line in _cpu_lines() if line.startswith(("model name", "Model"))]
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def has_bfloat16() -> bool:
    """Return whether products in bfloat16 are fast here: on a GPU, or by the CPU's own instructions.

    MOE_DIST_ISA, by which tests use this processor as an older one, counts.
    """
    if has_gpu():
        return True
    return os.environ.get("MOE_DIST_ISA", "native") == "native" and not BFLOAT16_INSTRUCTIONS.isdisjoint(_cpu_flags())


def _cpu_lines() -> list[str]:
    try:
        return CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _cpu_flags() -> list[str]:
    return next((line.split() for line in _cpu_lines() if line.startswith(("flags", "Features"))), [])


def _torch_is_cpu_build() -> bool:
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
