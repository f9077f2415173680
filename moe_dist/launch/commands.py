"""The command of each launcher, one word an item: no shell reads it, so no word of a configuration can become one."""

import base64
import json
import sys
from collections.abc import Callable, Iterable

from moe_dist.errors import LaunchError
from moe_dist.launch.environment import free_port
from moe_dist.launch.job import RANK_SCRIPT, Job, Launcher, visible_gpus
from moe_dist.launch.tasks import TRAIN

TRAIN_SBATCH = RANK_SCRIPT.parents[2] / "slurm" / "train.sbatch"


def node_command(job: Job, node: int) -> list[str]:
    """What starts the ranks of one machine of a `local`, `torchrun` or `deepspeed` job."""
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
    """Its runner on this machine; on several, what its runner starts on each of them."""
    if job.is_here:
        # Ranks meet through a file (supervise.py); DeepSpeed still exports a port, so it gets one free just now.
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
    """DeepSpeed's `--num_gpus` would take the machine's first GPUs, whatever CUDA_VISIBLE_DEVICES says."""
    visible = visible_gpus()
    if len(visible) < ranks:  # none are listed, or the ranks use the CPU
        return f"--num_gpus={ranks}"
    return f"--include=localhost:{','.join(visible[:ranks])}"


def mpirun(job: Job, exported: Iterable[str]) -> list[str]:
    """Open MPI's command for any number of machines; `exported` names the variables that other machines get too."""
    hosts = ",".join(f"{node.host}:{node.ranks}" for node in job.nodes)
    command = ["mpirun", "-n", str(job.ranks), "--host", hosts, "--bind-to", "none"]
    names = [] if job.is_here else [word for name in sorted(exported) for word in ("-x", name)]
    return [*command, *names, *job.options, sys.executable, "-u", *job.rank_command]


def sbatch(job: Job) -> list[str]:
    """Submits the shipped template; options win over what it says itself.

    Raises:
        LaunchError: the job is no training, which is all that the template does.
    """
    if job.task != TRAIN:
        raise LaunchError(
            "--launcher slurm submits nothing but training: give this command inside an allocation, such as salloc's, "
            f"where srun starts its {job.ranks} ranks"
        )
    size = [f"--nodes={len(job.nodes)}", f"--ntasks-per-node={job.nodes[0].ranks}"]
    return ["sbatch", *size, *job.options, str(TRAIN_SBATCH), *job.words]


def srun(job: Job) -> list[str]:
    """Starts the ranks inside an allocation that exists; the first that fails ends the others on all nodes."""
    size = [f"--nodes={len(job.nodes)}", f"--ntasks={job.ranks}", f"--ntasks-per-node={job.nodes[0].ranks}"]
    command = ["srun", *size, "--kill-on-bad-exit=1", *job.options]
    return [*command, sys.executable, "-u", *job.rank_command]
