"""Detection of a rank's place in the job from the environment variables of its launcher."""

import os
import re
import shlex
import socket
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_dist.config.machine import has_gpu
from moe_dist.config.yaml_text import shortened
from moe_dist.errors import LaunchError

Kind = Literal["alone", "local", "deepspeed", "torchrun", "environment", "mpi", "slurm"]

INIT_METHOD = "MOE_DIST_INIT_METHOD"
"""Variable with torch's init_method; `moe-dist launch` sets it to a file, since a port may be taken."""
STARTER = "MOE_DIST_STARTER"
SHARED_GPU = "MOE_DIST_SHARED_GPU"
"""Variable that at "1" puts all ranks of a machine on its first GPU, with gloo, for tests."""
COMMAND = "MOE_DIST_COMMAND"
"""Variable with the command line that the user typed, to be shown where a run stops early."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_DIGITS = 18
"""Largest number of digits of a number in a variable."""


@dataclass(frozen=True)
class RankEnvironment:
    """Place of one rank in the job; `rendezvous.py` finds the address at which the ranks connect.

    Attributes:
        kind: launcher that started this process; `alone`: none, the process is the whole job.
        local_rank, local_world_size: rank and number of ranks on this machine.
    """

    kind: Kind
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Export the variables that torch.distributed and DeepSpeed read, the same for every launcher."""
        environment.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
        )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} ({self.kind})"


@dataclass(frozen=True)
class _Names:
    """Environment variables that hold rank, world size and local rank under one kind of launcher."""

    kind: Kind
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_LOCAL = _Names("local", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TORCHRUN = _Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_DEEPSPEED = _Names("deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_ENVIRONMENT = _Names("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPEN_MPI = _Names("mpi", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
_PMI = _Names("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH, Intel MPI
_SLURM = _Names("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def discover(environment: Mapping[str, str]) -> RankEnvironment:
    """Read the rank's place from environment variables.

    Raises:
        LaunchError: a variable is missing, is not a number, or contradicts another; names it with its value.
    """
    names = _names(environment)
    if names is None:
        return RankEnvironment("alone", 0, 1, 0, 1)
    if names is _ENVIRONMENT and names.local_rank not in environment and names.local_world_size not in environment:
        return _without_local_rank(environment)
    rank, world = number(environment, names.rank), number(environment, names.world_size)
    local_world = _local_world_size(environment, names, world)
    local_rank = number(environment, names.local_rank, default=rank if local_world == world else None)
    _require_below(names.rank, rank, names.world_size, world)
    _require_below(names.local_rank, local_rank, "the ranks of this machine", local_world)
    if local_world > world:
        raise LaunchError(f"{names.local_world_size}={local_world} is more than {names.world_size}={world}")
    return RankEnvironment(names.kind, rank, world, local_rank, local_world)


def _without_local_rank(environment: Mapping[str, str]) -> RankEnvironment:
    """Return the place of a process that is alone on its machine, as in a pod, since it has no local rank.

    Raises:
        LaunchError: several GPUs are visible, so that the process may be one of several here.
    """
    rank, world = number(environment, "RANK"), number(environment, "WORLD_SIZE")
    _require_below("RANK", rank, "WORLD_SIZE", world)
    gpus = visible_gpu_count(environment)
    if gpus > 1 and world > 1:
        raise LaunchError(
            f"LOCAL_RANK is not set, and {gpus} GPUs are visible: set LOCAL_RANK, from 0 on each machine (0 if it runs "
            "one process)"
        )
    here = environment.get("MASTER_ADDR") in LOOPBACK and "KUBERNETES_SERVICE_HOST" not in environment
    if here and not gpus:
        return RankEnvironment("environment", rank, world, rank, world)
    return RankEnvironment("environment", rank, world, 0, 1)


def visible_gpu_count(environment: Mapping[str, str]) -> int:
    """Return the number of GPUs that torch could use here, without importing torch."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed in ("", "-1") or environment.get("DS_ACCELERATOR") == "cpu" or not has_gpu():
        return 0
    present = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdecimal()])
    if listed is None:
        return present
    count = len([gpu for gpu in listed.split(",") if gpu.strip()])
    return min(count, present) if present else count


def _names(environment: Mapping[str, str]) -> _Names | None:
    """Return the variables of the launcher, None without one; RANK and WORLD_SIZE win over those of outer launchers."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        if environment.get(STARTER) == "local":
            return _LOCAL
        if "TORCHELASTIC_RUN_ID" in environment:
            return _TORCHRUN
        return _DEEPSPEED if "LOCAL_SIZE" in environment and "CROSS_SIZE" in environment else _ENVIRONMENT
    if _OPEN_MPI.rank in environment:
        return _OPEN_MPI
    if _PMI.rank in environment and _PMI.local_rank in environment:
        return _PMI  # before SLURM: ranks inherit SLURM's variables if mpirun used it to start one helper per node
    if environment.get(_SLURM.world_size, "1") != "1":
        return _SLURM  # a step of srun; an sbatch script itself is one process, whatever SLURM_NTASKS says
    return _PMI if _PMI.rank in environment else None


def _local_world_size(environment: Mapping[str, str], names: _Names, world: int) -> int:
    if names is not _SLURM or names.local_world_size not in environment:
        return number(environment, names.local_world_size, default=world)
    text, node, nodes = environment[names.local_world_size], number(environment, "SLURM_NODEID", default=0), 0
    for part in text.split(","):  # such as 4(x2),3: tasks of each node
        if found := re.fullmatch(rf"(\d{{1,{MOST_DIGITS}}})(?:\(x(\d{{1,{MOST_DIGITS}}})\))?", part):
            nodes += int(found[2] or 1)
            if node < nodes:
                return int(found[1])
    raise LaunchError(
        f"{names.local_world_size}={shortened(text)!r} does not say how many tasks SLURM_NODEID={node} runs"
    )


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise LaunchError(
            f"{name} is not set, though a launcher's other variables are: start ranks with `moe-dist launch`, "
            "deepspeed, torchrun, mpirun or srun, or unset RANK and WORLD_SIZE to run alone"
        )
    return environment[name]


def number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable that must hold a whole number >= 0, or raise a LaunchError that names it."""
    if default is not None and name not in environment:
        return default
    text = _text(environment, name)
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise LaunchError(f"{name}={shortened(text)!r} is not a whole number of 0 or more")
    return int(text)


def _require_below(name: str, value: int, limit_name: str, limit: int) -> None:
    if value >= limit:
        raise LaunchError(f"{name}={value} must be less than {limit_name} ({limit}): ranks count from 0")


def split_words(name: str, text: str) -> list[str]:
    """Split an option or a variable into words as a shell would, or raise a LaunchError that names it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"{name} {text!r}: {error}: quote it as in a shell") from error


def free_port() -> int:
    """Return a free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_process(environment: MutableMapping[str, str], threads: int, local_world_size: int) -> None:
    """Set the variables that torch and DeepSpeed read at import: the accelerator and the number of CPU threads.

    Args:
        threads: CPU threads per rank; 0: as the environment has it, else the cores divided among the local ranks.
    """
    if not has_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    share = str(threads or max(1, usable_cores() // local_world_size))
    for name in THREAD_VARIABLES:
        if threads:
            environment[name] = share
        else:
            environment.setdefault(name, environment.get("OMP_NUM_THREADS", share))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def silence_library_warnings() -> None:
    """Ignore warnings for the developers of libraries, which every rank would print into the live display."""
    if not sys.warnoptions:  # not if the user asks for warnings
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|torchao|megatron|deepspeed|apex)\b")
