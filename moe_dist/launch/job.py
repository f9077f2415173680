"""What `moe-dist launch` is asked to start, checked before anything starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from moe_dist.config import RunConfig, load_config, resolve_batch, resolve_world
from moe_dist.errors import LaunchError
from moe_dist.launch.environment import has_gpu
from moe_dist.launch.hostfile import THIS_MACHINE, Node, read_hostfile, take

ENTRY = Path(__file__).with_name("rank.py")
DEFAULT_PORT = 29500


class Launcher(StrEnum):
    """Who starts the ranks."""

    LOCAL = "local"
    TORCHRUN = "torchrun"
    DEEPSPEED = "deepspeed"
    MPI = "mpi"
    SLURM = "slurm"


@dataclass(frozen=True)
class Job:
    """What to start: ranks of `entry` on some machines, numbered machine by machine.

    Attributes:
        words: what each rank's script is given: the configuration and the overrides.
        threads: CPU threads a rank; 0: the cores of a machine shared among its ranks.
        port: where ranks of several machines meet, on the first one.
        options: further words for the launcher itself.
    """

    launcher: Launcher
    nodes: tuple[Node, ...]
    words: tuple[str, ...]
    threads: int = 0
    entry: Path = ENTRY
    port: int = DEFAULT_PORT
    options: tuple[str, ...] = ()

    @classmethod
    def here(
        cls, launcher: Launcher, ranks: int, words: tuple[str, ...], entry: Path = ENTRY, threads: int = 0
    ) -> "Job":
        """A job on this machine alone."""
        return cls(launcher, (Node(THIS_MACHINE[0], ranks),), words, threads, entry)

    @property
    def ranks(self) -> int:
        """How many ranks all machines run together."""
        return sum(node.ranks for node in self.nodes)

    @property
    def is_here(self) -> bool:
        """Nothing but this machine is needed."""
        return len(self.nodes) == 1 and self.nodes[0].host in THIS_MACHINE

    def ranks_of(self, node: int) -> range:
        """The ranks that run on one of the machines."""
        first = sum(before.ranks for before in self.nodes[:node])
        return range(first, first + self.nodes[node].ranks)


@dataclass(frozen=True)
class JobSize:
    """How large a job is asked to be; None: not said.

    Attributes:
        ranks: of the whole job.
    """

    ranks: int | None = None
    nodes: int | None = None
    ranks_per_node: int | None = None
    hostfile: Path | None = None


def plan(
    launcher: Launcher,
    size: JobSize,
    config_path: str,
    overrides: Sequence[str],
    port: int = DEFAULT_PORT,
    options: Sequence[str] = (),
) -> Job:
    """Checks the configuration against the number of ranks and says what to start.

    Raises:
        ConfigError: the configuration cannot work, or not with that many ranks.
        LaunchError: sizes that contradict each other, machines that are not named, more ranks than visible GPUs.
    """
    config = load_config(config_path, overrides)
    nodes = machines(launcher, size, _ranks_wanted(config))
    job = Job(launcher, nodes, (config_path, *overrides), config.world.threads, port=port, options=tuple(options))
    gpus = visible_gpus() if job.is_here and config.world.backend != "gloo" else []
    if 0 < len(gpus) < job.ranks:
        listed = ",".join(gpus)
        raise LaunchError(f"{job.ranks} ranks are more than the {len(gpus)} GPUs of CUDA_VISIBLE_DEVICES={listed}")
    resolve_world(config, job.ranks)
    resolve_batch(config, job.ranks)
    return job


def machines(launcher: Launcher, size: JobSize, ranks_wanted: int) -> tuple[Node, ...]:
    """The machines of a job and how many ranks each runs.

    Args:
        ranks_wanted: of the whole job, where `size` does not say.

    Raises:
        LaunchError: sizes that contradict each other, or machines that are not named.
    """
    _require_positive(size)
    if size.hostfile is not None:
        if launcher is Launcher.SLURM:
            raise LaunchError("--hostfile does not go with --launcher slurm, which chooses the nodes: give --nodes")
        nodes = take(read_hostfile(size.hostfile), size.nodes, size.ranks_per_node)
    else:
        nodes = _unnamed(launcher, size, size.ranks or ranks_wanted)
    ranks = sum(node.ranks for node in nodes)
    if size.ranks not in (None, ranks):
        raise LaunchError(f"--ranks {size.ranks} contradicts {len(nodes)} node(s) with {ranks} ranks together")
    return nodes


def _unnamed(launcher: Launcher, size: JobSize, wanted: int) -> tuple[Node, ...]:
    """Machines without a host file: this one, or as many as asked of SLURM."""
    count = size.nodes or 1
    if count > 1 and launcher is not Launcher.SLURM:
        raise LaunchError(f"--nodes {count} needs --hostfile: a file with a line `HOST slots=N` for each machine")
    per_node = size.ranks_per_node
    if per_node is None:
        per_node, left = divmod(wanted, count)
        if left or not per_node:
            raise LaunchError(f"{wanted} ranks cannot be divided over --nodes {count}: give --ranks-per-node")
    host = None if launcher is Launcher.SLURM else THIS_MACHINE[0]
    return (Node(host, per_node),) * count


def _require_positive(size: JobSize) -> None:
    for option, value in (("ranks", size.ranks), ("nodes", size.nodes), ("ranks-per-node", size.ranks_per_node)):
        if value is not None and value < 1:
            raise LaunchError(f"--{option} {value} is too few: at least one must work")


def _ranks_wanted(config: RunConfig) -> int:
    world = config.world
    return (world.data or 1) * (world.cluster or 1) * world.shard


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES lists by number, or none where it does not or the CPU is used anyway."""
    if not has_gpu() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    return gpus if all(gpu.isdecimal() for gpu in gpus) else []
