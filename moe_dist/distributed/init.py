"""Initialization of this process: device, threads, default process group."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_dist.config import WorldConfig
from moe_dist.errors import LaunchError
from moe_dist.launch.environment import INIT_METHOD, SHARED_GPU


@dataclass(frozen=True)
class RankInfo:
    """Rank, device and timeout of this process."""

    rank: int
    ranks: int
    device: torch.device
    timeout: timedelta


def init_distributed(world: WorldConfig, alone: bool = False) -> RankInfo:
    """Initialize the default process group from the launcher's environment, or for a single process.

    Args:
        alone: make a group of this process alone, also inside a job of several ranks.

    Raises:
        LaunchError: there is no GPU for this rank, or the other ranks cannot be reached.
    """
    ranks = 1 if alone else int(os.environ.get("WORLD_SIZE", "1"))
    rank = 0 if alone else int(os.environ.get("RANK", "0"))
    shared = os.environ.get(SHARED_GPU) == "1"
    device = _device(world.backend, 0 if shared else int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        _set_threads(world.threads, ranks)
    of_device = "nccl" if device.type == "cuda" and not shared else "gloo"
    backend = of_device if world.backend == "auto" else world.backend
    timeout = timedelta(seconds=world.timeout_seconds)
    if not dist.is_initialized():
        _init_process_group(backend, rank, ranks, timeout, alone)
    return RankInfo(dist.get_rank(), dist.get_world_size(), device, timeout)


def shutdown() -> None:
    """Destroy the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(backend: str, local_rank: int) -> torch.device:
    """Return this rank's CUDA GPU, or the CPU if there is no GPU or the user chose the CPU.

    Raises:
        LaunchError: NCCL is configured without a GPU, or the node has fewer GPUs than local ranks.
    """
    cpu_wanted = backend == "gloo" or os.environ.get("DS_ACCELERATOR") == "cpu"
    if cpu_wanted or not torch.cuda.is_available():
        if backend == "nccl":
            why = "DS_ACCELERATOR=cpu is set" if cpu_wanted else "torch finds none here"
            raise LaunchError(f"world.backend=nccl needs a CUDA GPU, but {why}: use auto or gloo")
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise LaunchError(
            f"LOCAL_RANK={local_rank} has no GPU: torch finds {gpus} on this machine; start at most {gpus} ranks here, "
            "or set world.backend=gloo to use the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _set_threads(wanted: int, ranks: int) -> None:
    """Set the number of torch's CPU threads.

    If `wanted` is 0, OMP_NUM_THREADS applies, which torch reads itself; else the node's cores are divided over ranks.
    """
    if wanted:
        torch.set_num_threads(wanted)
    elif "OMP_NUM_THREADS" not in os.environ:
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // on_this_node))


def _init_process_group(backend: str, rank: int, ranks: int, timeout: timedelta, alone: bool) -> None:
    if alone or (ranks == 1 and "MASTER_PORT" not in os.environ):
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    where = os.environ.get(INIT_METHOD, "env://")
    try:
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=ranks, timeout=timeout)
    except (dist.DistError, ValueError, RuntimeError) as error:
        address = ":".join(os.environ.get(name, f"({name} unset)") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise LaunchError(f"rank {rank} of {ranks} cannot join the others ({where}, {address}): {error}") from error
