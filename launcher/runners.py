"""`moe-dist launch`: builds the command of a launcher for this machine, checks the configuration, and runs it."""

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from launcher.environment import INIT_METHOD, free_port, has_gpu, prepare_process
from launcher.supervise import run_job
from moe_dist.config import RunConfig, load_config, resolve_batch, resolve_world
from moe_dist.errors import LaunchError

ENTRY = Path(__file__).with_name("train.py")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", INIT_METHOD)


class Launcher(StrEnum):
    """Who starts the ranks."""

    DEEPSPEED = "deepspeed"
    TORCHRUN = "torchrun"


@dataclass(frozen=True)
class Job:
    """What to start: `ranks` processes of `entry` on this machine.

    Attributes:
        words: what each rank's script is given: the configuration and the overrides.
        threads: CPU threads a rank; 0: the cores shared among the ranks.
    """

    launcher: Launcher
    ranks: int
    words: tuple[str, ...]
    threads: int = 0
    entry: Path = ENTRY


def plan(launcher: Launcher, ranks: int | None, config_path: str, overrides: Sequence[str]) -> Job:
    """Checks the configuration against the number of ranks and says what to start.

    Args:
        ranks: None: as many as `world` asks for, else one.

    Raises:
        ConfigError: the configuration cannot work, or not with that many ranks.
        LaunchError: the number of ranks is less than one, or more than the GPUs made visible.
    """
    config = load_config(config_path, overrides)
    count = _ranks_wanted(config) if ranks is None else ranks
    if count < 1:
        raise LaunchError(f"--ranks {count} is too few: at least one rank must work")
    if config.world.backend != "gloo" and 0 < len(gpus := _visible_gpus()) < count:
        raise LaunchError(f"{count} ranks are more than the {len(gpus)} GPUs of CUDA_VISIBLE_DEVICES={','.join(gpus)}")
    resolve_world(config, count)
    resolve_batch(config, count)
    return Job(launcher, count, (config_path, *overrides), config.world.threads)


def command(job: Job) -> list[str]:
    """The launcher's command, one word an item; it needs no shell, no ssh and no port known beforehand."""
    entry = [str(job.entry), *job.words]
    if job.launcher is Launcher.TORCHRUN:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        return [*torchrun, f"--nproc-per-node={job.ranks}", *entry]
    # Ranks meet through a file (supervise.py); DeepSpeed still exports a port, so it gets one that was free just now.
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile=", "--log_level=critical"]
    address = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [*deepspeed, _devices(job.ranks), *address, *entry]


def _devices(ranks: int) -> str:
    """DeepSpeed's `--num_gpus` would take the machine's first GPUs, whatever CUDA_VISIBLE_DEVICES says."""
    visible = _visible_gpus()
    if len(visible) < ranks:  # none are listed, or the ranks use the CPU
        return f"--num_gpus={ranks}"
    return f"--include=localhost:{','.join(visible[:ranks])}"


def _visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES lists by number, or none where it does not or the CPU is used anyway."""
    if not has_gpu() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    return gpus if all(gpu.isdecimal() for gpu in gpus) else []


def environment(job: Job) -> dict[str, str]:
    """This process's environment made fit for ranks: their own place removed, threads and accelerator set."""
    variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    prepare_process(variables, job.threads, job.ranks)
    if not has_gpu() and any(name == "lo" for _, name in socket.if_nameindex()):
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the host's name, which may not resolve
    return variables


def launch(job: Job) -> int:
    """Runs the job on this machine to its end and returns its exit code (`supervise.run_job`)."""
    return run_job(command(job), environment(job), job.ranks, rendezvous_file=job.launcher is Launcher.DEEPSPEED)


def dry_run(job: Job) -> str:
    """The command as one would type it."""
    return shlex.join(command(job))


def _ranks_wanted(config: RunConfig) -> int:
    world = config.world
    return (world.data or 1) * (world.cluster or 1) * world.shard
