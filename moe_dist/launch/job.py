"""Jobs: the ranks to start and their machines, checked before anything starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from moe_dist.config import load_config, resolve_batch, resolve_world
from moe_dist.config.machine import has_gpu
from moe_dist.errors import LaunchError
from moe_dist.launch.hostfile import THIS_MACHINE, Node, read_hostfile, take
from moe_dist.launch.options import option, to_json
from moe_dist.launch.preflight import require_free_port, require_ready
from moe_dist.launch.tasks import TRAIN

RANK_SCRIPT = Path(__file__).with_name("rank.py")
DEFAULT_PORT = 29500


class Launcher(StrEnum):
    """Program that starts the ranks."""

    LOCAL = "local"
    TORCHRUN = "torchrun"
    DEEPSPEED = "deepspeed"
    MPI = "mpi"
    SLURM = "slurm"


@dataclass(frozen=True)
class Job:
    """Ranks to start on some machines, numbered machine by machine.

    Attributes:
        words: arguments of each rank's script: the configuration, if there is one, and the overrides.
        threads: CPU threads a rank; 0: the cores of a machine shared among its ranks.
        entry: script of a rank.
        port: rendezvous port of several machines, on the first one.
        options: further arguments of the launcher itself.
        task: name of the task in `tasks.TASKS`.
        task_options: options of the task as JSON; empty: its defaults.
        uses_gpus: False: the ranks use the CPU by the user's choice, so that a scheduler is asked for no GPUs.
    """

    launcher: Launcher
    nodes: tuple[Node, ...]
    words: tuple[str, ...]
    threads: int = 0
    entry: Path = RANK_SCRIPT
    port: int = DEFAULT_PORT
    options: tuple[str, ...] = ()
    task: str = TRAIN
    task_options: str = ""
    uses_gpus: bool = True

    @classmethod
    def here(
        cls, launcher: Launcher, ranks: int, words: tuple[str, ...], entry: Path = RANK_SCRIPT, threads: int = 0
    ) -> "Job":
        """Return a job on this machine alone."""
        return cls(launcher, (Node(THIS_MACHINE[0], ranks),), words, threads, entry)

    def with_task(self, task: str, options: object | None = None) -> "Job":
        """Return the same job with another task."""
        return replace(self, task=task, task_options="" if options is None else to_json(options))

    @property
    def rank_command(self) -> list[str]:
        """Arguments of Python for one rank: the script and its words."""
        task = [] if self.task == TRAIN else ["--task", self.task]
        options = ["--options", self.task_options] if self.task_options else []
        return [str(self.entry), *task, *options, *self.words]

    @property
    def ranks(self) -> int:
        """Number of ranks of all machines."""
        return sum(node.ranks for node in self.nodes)

    @property
    def is_here(self) -> bool:
        """True for a job on this machine alone."""
        return len(self.nodes) == 1 and self.nodes[0].host in THIS_MACHINE

    @property
    def can_fork(self) -> bool:
        """True if the ranks of a machine without GPUs may be forked from one process (`fork_server.py`)."""
        return self.entry == RANK_SCRIPT

    def ranks_of(self, node: int) -> range:
        """Return the ranks of one of the machines."""
        first = sum(before.ranks for before in self.nodes[:node])
        return range(first, first + self.nodes[node].ranks)


@dataclass(frozen=True)
class JobSize:
    """Requested size of a job; None: not given."""

    ranks: int | None = option(None, "Ranks of the job; default: as the keys under `world` say.")
    nodes: int | None = option(None, "Machines; default: this one, or all of the host file.")
    ranks_per_node: int | None = option(None, "Ranks on each machine; default: its slots.")
    hostfile: Path | None = option(None, "File of machines, one line `HOST slots=N` each.")


def plan(
    launcher: Launcher,
    size: JobSize,
    config_path: str,
    overrides: Sequence[str],
    port: int = DEFAULT_PORT,
    options: Sequence[str] = (),
    starts: bool = True,
) -> Job:
    """Check the configuration against the number of ranks and return the job to start.

    Args:
        starts: also check what the job needs from this machine (`preflight.py`); False: it is only described.

    Raises:
        ConfigError: the configuration cannot work, not with that many ranks, or not on this machine.
        LaunchError: sizes contradict each other, machines are not named, or the rendezvous port is taken.
    """
    config = load_config(config_path, overrides)
    world = config.world
    nodes = machines(launcher, size, (world.data or 1) * (world.cluster or 1) * world.shard)
    words, on_gpus = (config_path, *overrides), world.backend != "gloo"
    job = Job(launcher, nodes, words, world.threads, port=port, options=tuple(options), uses_gpus=on_gpus)
    resolve_world(config, job.ranks)
    resolve_batch(config, job.ranks)
    if not starts:
        return job
    require_ready(config, job.ranks if job.is_here else None)
    if not job.is_here and launcher is not Launcher.SLURM:
        require_free_port(nodes[0].host, port)
    return job


def machines(launcher: Launcher, size: JobSize, ranks_wanted: int) -> tuple[Node, ...]:
    """Return the machines of a job with their numbers of ranks.

    Args:
        ranks_wanted: ranks of the job if `size` gives no number.

    Raises:
        LaunchError: sizes contradict each other, or machines are not named.
    """
    for option_, value in (("ranks", size.ranks), ("nodes", size.nodes), ("ranks-per-node", size.ranks_per_node)):
        if value is not None and value < 1:
            raise LaunchError(f"--{option_} {value} must be >= 1")
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
    """Return machines without a host file: this one, or as many as SLURM is asked for."""
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


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES lists by number; none if it lists no numbers or the CPU is used."""
    if not has_gpu() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    return gpus if all(gpu.isdecimal() for gpu in gpus) else []
