"""What `moe-dist launch` would start."""

import base64
import json
import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError, LaunchError
from moe_dist.launch import commands, environment, runners
from moe_dist.launch import job as jobs
from moe_dist.launch.commands import node_command
from moe_dist.launch.environment import free_port
from moe_dist.launch.hostfile import read_hostfile
from moe_dist.launch.job import RANK_SCRIPT, Job, JobSize, Launcher, plan


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "a run.yaml"
    path.write_text("world: {data: 2, cluster: 2}\n")
    return str(path)


def test_deepspeed_command(config: str) -> None:
    words = node_command(plan(Launcher.DEEPSPEED, JobSize(), config, ["seed=1"]), 0)
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert "--num_gpus=4" in words  # data 2 x cluster 2
    assert "--master_addr=127.0.0.1" in words
    assert words[-3:] == [str(RANK_SCRIPT), config, "seed=1"]
    assert RANK_SCRIPT.is_file()


def test_torchrun_command_names_no_port(config: str) -> None:
    words = node_command(plan(Launcher.TORCHRUN, JobSize(4), config, []), 0)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=4", "--local-addr=127.0.0.1"} < set(words)
    assert not any("port" in word for word in words)


@pytest.mark.parametrize(
    ("ranks", "overrides", "error"),
    [
        (3, [], ConfigError),
        (4, ["train.global_batch_size=6"], ConfigError),
        (0, [], LaunchError),
        (4, ["moe.top_k=20"], ConfigError),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    config: str, ranks: int, overrides: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        plan(Launcher.DEEPSPEED, JobSize(ranks), config, overrides)


@pytest.fixture
def gpus_2_and_5(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (jobs, environment):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.mark.usefixtures("gpus_2_and_5")
def test_deepspeed_takes_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(ranks: int) -> list[str]:
        words = node_command(Job.here(Launcher.DEEPSPEED, ranks, ()), 0)
        return [word for word in words if word.startswith(("--include", "--num_gpus"))]

    assert devices(2) == ["--include=localhost:2,5"]
    assert devices(1) == ["--include=localhost:2"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert devices(2) == ["--num_gpus=2"]
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b")
    assert devices(1) == ["--num_gpus=1"]


@pytest.mark.usefixtures("gpus_2_and_5")
def test_more_ranks_than_visible_gpus_are_refused(config: str) -> None:
    with pytest.raises(ConfigError, match="4 ranks are more than the 2 GPUs of CUDA_VISIBLE_DEVICES=2,5"):
        plan(Launcher.DEEPSPEED, JobSize(4), config, [])
    assert plan(Launcher.DEEPSPEED, JobSize(4), config, ["world.backend=gloo"]).ranks == 4


HOSTS = """
# a comment
n1 slots=2   # another
n2 slots=3
"""


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    return path


FREE = ["world.data=null", "world.cluster=1", "train.global_batch_size=60"]  # for 1 to 5 ranks


@pytest.mark.parametrize(
    ("size", "ranks"),
    [
        ({}, [2, 3]),
        ({"nodes": 1}, [2]),
        ({"ranks_per_node": 2}, [2, 2]),
        ({"nodes": 2, "ranks_per_node": 1, "ranks": 2}, [1, 1]),
    ],
)
def test_machines_come_from_the_host_file(config: str, hostfile: Path, size: dict[str, int], ranks: list[int]) -> None:
    job = plan(Launcher.DEEPSPEED, JobSize(hostfile=hostfile, **size), config, FREE)
    assert [(node.host, node.ranks) for node in job.nodes] == list(zip(("n1", "n2"), ranks, strict=False))
    assert [rank for node in range(len(ranks)) for rank in job.ranks_of(node)] == list(range(sum(ranks)))


@pytest.mark.parametrize(
    ("launcher", "size", "text", "message"),
    [
        ("deepspeed", {"nodes": 2}, None, "--nodes 2 needs --hostfile"),
        ("deepspeed", {"nodes": 3}, HOSTS, "--nodes 3 is more than the 2 hosts"),
        ("deepspeed", {"ranks_per_node": 3}, HOSTS, "--ranks-per-node 3 is more than the slots=2 of n1"),
        ("deepspeed", {"ranks": 4}, HOSTS, "--ranks 4 contradicts 2 node(s) with 5 ranks"),
        ("deepspeed", {}, "n1 slots=two", "line 1: 'n1 slots=two' is not `HOST slots=N`"),
        ("deepspeed", {}, "n1 slots=0", "line 1"),
        ("deepspeed", {}, "-oProxyCommand=x slots=2", "line 1"),
        ("deepspeed", {}, "n1 slots=1\nn1 slots=2", "line 2: n1 is listed twice"),
        ("deepspeed", {}, "n1 slots=1\n\nme@N1. slots=2", "line 3: me@N1. is the machine of n1"),
        ("deepspeed", {}, "localhost slots=1\n127.0.0.1 slots=2", "line 2: 127.0.0.1 is the machine of localhost"),
        ("deepspeed", {}, "0::1 slots=1\nlocalhost slots=2", "line 2: localhost is the machine of 0::1 (this machine)"),
        ("deepspeed", {}, "n1 slots=" + "9" * 30, "line 1: slots=99999999999999999999 must be <= 4096"),
        ("deepspeed", {}, "n1 slots=4097", "line 1: slots=4097 must be <= 4096"),
        ("deepspeed", {}, "# nothing", "lists no host"),
        ("slurm", {}, HOSTS, "--hostfile does not go with --launcher slurm"),
        ("slurm", {"nodes": 3, "ranks": 4}, None, "4 ranks cannot be divided over --nodes 3"),
    ],
)
def test_sizes_that_make_no_sense_are_one_line(
    config: str, tmp_path: Path, launcher: str, size: dict[str, int], text: str | None, message: str
) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LaunchError) as caught:
        plan(Launcher(launcher), JobSize(hostfile=file if text else None, **size), config, FREE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_machine_gets_its_part(config: str, hostfile: Path) -> None:
    def words(launcher: Launcher) -> list[str]:
        return node_command(plan(launcher, JobSize(hostfile=hostfile), config, FREE, port=1234), 1)

    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=3", "--master-addr=n1", "--master-port=1234"} < set(
        words(Launcher.TORCHRUN)
    )
    assert {"--ranks=3", "--first-rank=2", "--world-size=5", "--rendezvous=n1:1234"} < set(words(Launcher.LOCAL))
    deepspeed = words(Launcher.DEEPSPEED)
    assert {"deepspeed.launcher.launch", "--node_rank=1", "--master_addr=n1", "--master_port=1234"} < set(deepspeed)
    (world,) = [word.partition("=")[2] for word in deepspeed if word.startswith("--world_info")]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"n1": [0, 1], "n2": [0, 1, 2]}


def test_mpirun_takes_no_ipv6_address(config: str, tmp_path: Path) -> None:
    (tmp_path / "six").write_text("fe80::1 slots=2\nfe80::2 slots=2\n")
    job = plan(Launcher.MPI, JobSize(hostfile=tmp_path / "six"), config, FREE)
    with pytest.raises(LaunchError, match=r"mpirun's --host HOST:SLOTS cannot take the IPv6 address fe80::1: give the"):
        commands.mpirun(job, [])


def test_names_of_one_address_are_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"a": "10.0.0.1", "a.lab": "10.0.0.1", "b": "10.0.0.2"}
    found = {name: [(None, None, None, "", (address, 0))] for name, address in addresses.items()}
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port: found[host])
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\na.lab slots=1\n")
    with pytest.raises(LaunchError, match=r"line 3: a.lab is the machine of a \(10.0.0.1\), see line 1"):
        read_hostfile(tmp_path / "hosts")


def test_mpirun_command(config: str, hostfile: Path) -> None:
    job = plan(Launcher.MPI, JobSize(hostfile=hostfile), config, FREE, options=["--mca", "a", "b"])
    words = commands.mpirun(job, ["PATH"])
    assert words[:5] == ["mpirun", "-n", "5", "--host", "n1:2,n2:3"]
    assert words[words.index("-x") :][:5] == ["-x", "PATH", "--mca", "a", "b"]
    assert words[-4] == config


def test_slurm_submits_the_template_or_steps_into_an_allocation(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(os.environ, "VENV", "")
    job = plan(Launcher.SLURM, JobSize(nodes=2), config, ["seed=1"], options=["--partition=gpu"])
    template = str(commands.TRAIN_SBATCH)
    assert runners.dry_run(job) == shlex.join(
        [
            "sbatch",
            "--nodes=2",
            "--ntasks-per-node=2",
            "--gpus-per-node=2",
            "--partition=gpu",
            template,
            config,
            "seed=1",
        ]
    )
    on_cpus = plan(Launcher.SLURM, JobSize(nodes=2), config, ["world.backend=gloo", "world.threads=3"])
    assert commands.sbatch(on_cpus)[3:5] == ["--gpus-per-node=0", "--cpus-per-task=3"]
    assert commands.TRAIN_SBATCH.is_file()
    monkeypatch.setitem(os.environ, "SLURM_JOB_ID", "7")
    assert runners.dry_run(job).startswith("srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --kill-on-bad-exit=1")


@pytest.mark.parametrize("given", [None, "", "env of mine"])
def test_a_submitted_job_finds_this_python_unless_another_is_given(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "VENV"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setitem(os.environ, "VENV", given)
    monkeypatch.setattr(sys, "prefix", "/its own/venv")
    monkeypatch.setitem(os.environ, "PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$VENV" "$PWD" >submitted\n')
    (tmp_path / "sbatch").chmod(0o755)
    job = plan(Launcher.SLURM, JobSize(nodes=2), config, [])
    assert runners.launch(job) == 0
    python = "/its own/venv" if given is None else given
    assert (tmp_path / "submitted").read_text() == f"{python}\n{tmp_path}\n"
    assert runners.dry_run(job).startswith("VENV='/its own/venv' sbatch " if given is None else "sbatch ")


def test_dry_run_shows_every_machine_and_no_secret(
    config: str, hostfile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HF_TOKEN", "a-secret")
    monkeypatch.setitem(os.environ, "NCCL_DEBUG", "INFO")
    shown = runners.dry_run(plan(Launcher.TORCHRUN, JobSize(hostfile=hostfile), config, FREE))
    assert "a-secret" not in shown
    assert "NCCL_DEBUG=INFO" in shown
    assert [line.split(",")[0] for line in shown.splitlines()[::2]] == ["# on n1", "# on n2"]


def test_dry_run_quotes_words(config: str) -> None:
    assert f"'{config}'" in runners.dry_run(plan(Launcher.TORCHRUN, JobSize(4), config, []))


def test_ranks_do_not_inherit_our_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "3")
    monkeypatch.setitem(os.environ, "KEPT", "yes")
    variables = runners.environment(Job.here(Launcher.DEEPSPEED, 2, (), threads=3))
    assert "RANK" not in variables
    assert (variables["KEPT"], variables["OMP_NUM_THREADS"]) == ("yes", "3")


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
