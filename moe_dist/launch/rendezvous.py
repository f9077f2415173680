"""Rendezvous address of a job: MASTER_ADDR and MASTER_PORT as given, else as found by SLURM or MPI."""

import re
import socket
from collections.abc import Mapping, MutableMapping

from moe_dist.errors import LaunchError
from moe_dist.launch.environment import INIT_METHOD, RankEnvironment, free_port, number

LOWEST_PORT, HIGHEST_PORT = 15000, 31999  # below Linux's ephemeral ports


def resolve(place: RankEnvironment, environment: MutableMapping[str, str]) -> None:
    """Set the rendezvous address in the environment; collective under MPI.

    Raises:
        LaunchError: no address is given and none can be found, or it is not a host and a port.
    """
    alone = place.kind == "alone" or (place.world_size == 1 and "MASTER_PORT" not in environment)
    if alone or INIT_METHOD in environment:
        return
    if not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        for name, value in _found(place, environment).items():
            if not environment.get(name):
                environment[name] = value
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise LaunchError(_missing(name))
    port = number(environment, "MASTER_PORT")
    if not 0 < port < 65536:
        raise LaunchError(f"MASTER_PORT={port} is not a port: give one from 1 to 65535")


def describe(place: RankEnvironment, environment: Mapping[str, str]) -> str:
    """Return the launcher, the number of ranks and the rendezvous address in one line."""
    where = environment.get(INIT_METHOD) or f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    by = {"slurm": "srun", "mpi": "mpirun", "local": "moe-dist", "environment": "RANK and WORLD_SIZE"}
    nodes = "this node" if place.local_world_size == place.world_size else f"{place.local_world_size} on this node"
    return f"started by {by.get(place.kind, place.kind)}: {place.world_size} ranks, {nodes}; rendezvous at {where}"


def _found(place: RankEnvironment, environment: Mapping[str, str]) -> dict[str, str]:
    if place.kind == "slurm":
        return _from_slurm(environment)
    return _from_mpi(place) if place.kind == "mpi" else {}


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the step's first node, which runs rank 0, and a port computed from the step's number."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes or "SLURM_JOB_ID" not in environment:
        return {}
    reserved = re.match(r"\d+", environment.get("SLURM_STEP_RESV_PORTS", ""))  # srun --resv-ports
    step = number(environment, "SLURM_JOB_ID") * 31 + number(environment, "SLURM_STEP_ID", default=0)
    port = LOWEST_PORT + step % (HIGHEST_PORT - LOWEST_PORT + 1)
    return {"MASTER_ADDR": first_host(nodes), "MASTER_PORT": reserved[0] if reserved else str(port)}


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: `gpu[003-007,9],login` -> `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


def _from_mpi(place: RankEnvironment) -> dict[str, str]:
    """Broadcast rank 0's host and a free port there by MPI, then finalize MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        why = " ".join(str(error).split())
        raise LaunchError(f"{_missing('MASTER_ADDR')}; mpi4py, which could find it, fails: {why}") from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (place.rank, place.world_size):
        raise LaunchError(
            f"mpi4py sees rank {world.rank} of {world.size} in rank {place.rank} of {place.world_size}: it uses "
            "another MPI than mpirun's; install mpi4py for that one, or export MASTER_ADDR and MASTER_PORT"
        )
    alone = place.local_world_size == place.world_size
    mine = ("127.0.0.1" if alone else socket.gethostname(), free_port()) if place.rank == 0 else None
    host, port = world.bcast(mine)
    MPI.Finalize()  # an exit without it would count as a failure, also after training has succeeded
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def _missing(name: str) -> str:
    return (
        f"{name} is not set: export MASTER_ADDR (the host of rank 0) and MASTER_PORT (a free port there), the "
        "same for all ranks, or start them with `moe-dist launch`, deepspeed or torchrun"
    )
