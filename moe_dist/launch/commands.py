"""Command lines of the launchers, one word per item: no shell reads them, so configuration words need no quoting."""

import base64
import json
import sys
from collections.abc import Callable, Iterable

from moe_dist.config.shipped import shipped
from moe_dist.errors import LaunchError
from moe_dist.launch.environment import free_port
from moe_dist.launch.job import Job, Launcher, visible_gpus
from moe_dist.launch.tasks import TRAIN

TRAIN_SBATCH = shipped("slurm/train.sbatch")


def node_command(job: Job, node: int) -> list[str]:
    """Return the command that starts the ranks of one machine of a `local`, `torchrun` or `deepspeed` job."""
    build: Callable[[Job, int], list[str]] = {
        Launcher.LOCAL: _local,
        Launcher.TORCHRUN: _torchrun,
        Launcher.DEEPSPEED: _deepspeed,
    }[job.launcher]
    return [*build(job, node), *job.options, *job.rank_command]


def _local(job: Job, node: int) -> list[str]:
    ranks = job.ranks_of(node)
    command = [sys.executable, "-m", "moe_dist.launch.local_launcher", f"--ranks={len(ranks)}"]
    if job.is_here:
        return command
    rendezvous = f"--rendezvous={job.nodes[0].host}:{job.port}"
    return [*command, f"--first-rank={ranks.start}", f"--world-size={job.ranks}", rendezvous]


def _torchrun(job: Job, node: int) -> list[str]:
    torchrun, ranks = [sys.executable, "-m", "torch.distributed.run"], f"--nproc-per-node={job.nodes[node].ranks}"
    if job.is_here:
        return [*torchrun, "--standalone", "--local-addr=127.0.0.1", ranks]
    return [*torchrun, f"--nnodes={len(job.nodes)}", f"--node-rank={node}", *_rendezvous(job, "-"), ranks]


def _deepspeed(job: Job, node: int) -> list[str]:
    """Return DeepSpeed's runner for this machine, or on several machines the program that its runner starts on each."""
    if job.is_here:
        # Ranks use a rendezvous file (supervisor.py); DeepSpeed still exports a port, so it gets a free one.
        address = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile=", "--log_level=critical"]
        return [*runner, _devices(job.ranks), *address]
    world = json.dumps({at.host: list(range(at.ranks)) for at in job.nodes})
    world_info = f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}"
    launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level=critical"]
    return [*launch, world_info, f"--node_rank={node}", *_rendezvous(job, "_")]


def _rendezvous(job: Job, dash: str) -> list[str]:
    return [f"--master{dash}addr={job.nodes[0].host}", f"--master{dash}port={job.port}"]


def _devices(ranks: int) -> str:
    """Select visible GPUs; DeepSpeed's `--num_gpus` takes the machine's first ones and ignores CUDA_VISIBLE_DEVICES."""
    visible = visible_gpus()
    if len(visible) < ranks:  # none are listed, or the ranks use the CPU
        return f"--num_gpus={ranks}"
    return f"--include=localhost:{','.join(visible[:ranks])}"


def mpirun(job: Job, exported: Iterable[str]) -> list[str]:
    """Return Open MPI's command; `exported` names the variables that other machines receive too.

    Raises:
        LaunchError: a machine is given by an IPv6 address, which Open MPI cannot tell from its number of ranks.
    """
    for node in job.nodes:
        if ":" in str(node.host):
            raise LaunchError(
                f"--launcher mpi: mpirun's --host HOST:SLOTS cannot take the IPv6 address {node.host}: give the "
                "machine a name, as in /etc/hosts, or use another launcher"
            )
    hosts = ",".join(f"{node.host}:{node.ranks}" for node in job.nodes)
    command = ["mpirun", "-n", str(job.ranks), "--host", hosts, "--bind-to", "none"]
    names = [] if job.is_here else [word for name in sorted(exported) for word in ("-x", name)]
    return [*command, *names, *job.options, sys.executable, "-u", *job.rank_command]


def sbatch(job: Job) -> list[str]:
    """Return the command that submits the shipped template; its options win over those in the template.

    Raises:
        LaunchError: the job is no training, the only task of the template.
    """
    if job.task != TRAIN:
        raise LaunchError(
            "--launcher slurm submits training alone: run this command inside an allocation, such as salloc's, "
            f"where srun starts its {job.ranks} ranks"
        )
    ranks = job.nodes[0].ranks
    size = [f"--nodes={len(job.nodes)}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={ranks * job.uses_gpus:d}"]
    if job.threads:
        size.append(f"--cpus-per-task={job.threads}")
    return ["sbatch", *size, *job.options, str(TRAIN_SBATCH), *job.words]


def srun(job: Job) -> list[str]:
    """Return the command that starts ranks inside an allocation; the first failure ends all ranks on all nodes."""
    size = [f"--nodes={len(job.nodes)}", f"--ntasks={job.ranks}", f"--ntasks-per-node={job.nodes[0].ranks}"]
    command = ["srun", *size, "--kill-on-bad-exit=1", *job.options]
    return [*command, sys.executable, "-u", *job.rank_command]
