"""Execution of a job by its launcher, on this machine or on several, or display of its commands."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from shutil import which

from moe_dist.config.machine import has_gpu
from moe_dist.errors import LaunchError
from moe_dist.launch import commands, ssh_runner
from moe_dist.launch.environment import INIT_METHOD, STARTER, prepare_process
from moe_dist.launch.job import Job, Launcher
from moe_dist.launch.supervisor import run_job

RANK_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", INIT_METHOD, STARTER,
)  # fmt: skip
EXPORTED = re.compile(  # variables that other machines receive
    r"PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|(PYTHON|OMP_|MKL_|OPENBLAS_|DS_|TORCH|NCCL_|GLOO_|UCX_|MOE_DIST_|HF_|CUDA_HOME).*"
)

SECRET = re.compile("TOKEN|SECRET|PASSWORD|_KEY")


def environment(job: Job) -> dict[str, str]:
    """Return this process's environment for ranks here: without its rank, with threads and accelerator set."""
    variables = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    prepare_process(variables, job.threads, job.ranks)
    if not has_gpu() and any(name == "lo" for _, name in socket.if_nameindex()):
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the host's name, which may not resolve
    return variables


def exported_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that other machines receive too: paths and settings of the libraries in use."""
    return {name: value for name, value in variables.items() if EXPORTED.fullmatch(name) and name not in RANK_VARIABLES}


def launch(job: Job) -> int:
    """Run the job to its end and return its exit code; under SLURM outside an allocation, submit it.

    Raises:
        LaunchError: a program is not installed here.
    """
    supervised = job.launcher is Launcher.MPI and job.is_here  # elsewhere mpirun and srun end all ranks themselves
    if job.launcher in (Launcher.MPI, Launcher.SLURM) and not supervised:
        command = _installed(_foreign_command(job))
        variables = {**_for_template(command), **os.environ}
        return subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, check=False).returncode
    if job.is_here:
        outcome = run_job(
            _installed(_command(job)),
            environment(job),
            range(job.ranks),
            rendezvous_file=job.launcher is not Launcher.TORCHRUN,
            fork_ranks=job.can_fork and not has_gpu(),  # forks are not safe beside a GPU's driver
        )
    else:
        outcome = ssh_runner.run(job, exported_variables(os.environ))
    if outcome.line:
        print(f"moe-dist: {outcome.line}", file=sys.stderr, flush=True)
    return outcome.exit_code


def dry_run(job: Job) -> str:
    """Return the command of the job, or one for each machine, as one would type it."""
    if job.launcher in (Launcher.MPI, Launcher.SLURM) or job.is_here:
        command = _command(job) if job.is_here else _foreign_command(job)
        given = [f"{name}={shlex.quote(value)}" for name, value in _for_template(command).items()]
        return " ".join([*given, shlex.join(command)])
    exported = [
        f"{name}={'...' if SECRET.search(name) else value}"
        for name, value in sorted(exported_variables(os.environ).items())
    ]
    lines = []
    for number, node in enumerate(job.nodes):
        there = ["env", *exported, *commands.node_command(job, number)]
        lines += [
            f"# on {node.host}, started by: {shlex.join(ssh_runner.ssh_command(node.host or ''))}",
            shlex.join(there),
        ]
    return "\n".join(lines)


def _command(job: Job) -> list[str]:
    if job.launcher is Launcher.MPI:
        return commands.mpirun(job, ())
    return commands.node_command(job, 0)


def _foreign_command(job: Job) -> list[str]:
    if job.launcher is Launcher.MPI:
        return commands.mpirun(job, exported_variables(os.environ))
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:
        return commands.srun(job)
    if not commands.TRAIN_SBATCH.is_file():
        raise LaunchError(f"{commands.TRAIN_SBATCH} is missing: launch from a checkout of the repository")
    return commands.sbatch(job)


def _for_template(command: list[str]) -> dict[str, str]:
    """Return the variables of a submitted template: this Python as VENV, independent of the folder."""
    return {"VENV": sys.prefix} if command[0] == "sbatch" and "VENV" not in os.environ else {}


def _installed(command: list[str]) -> list[str]:
    if which(command[0]) is None and not Path(command[0]).is_file():
        raise LaunchError(f"{command[0]} is not installed here, or not on PATH")
    return command
