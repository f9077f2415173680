"""Finding one's rank in what each launcher sets."""

import os
from pathlib import Path

import pytest

from moe_dist.config import machine
from moe_dist.errors import LaunchError
from moe_dist.launch import environment
from moe_dist.launch.environment import RankEnvironment, discover, prepare_process

PLACE = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
DEEPSPEED = {**PLACE, "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
TORCHRUN = {**PLACE, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
RENDEZVOUS = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {
    **SBATCH,
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, RankEnvironment("alone", 0, 1, 0, 1)),
        ({"LOCAL_RANK": "7", "MASTER_PORT": "x"}, RankEnvironment("alone", 0, 1, 0, 1)),
        (DEEPSPEED, RankEnvironment("deepspeed", 2, 4, 0, 2)),
        (TORCHRUN, RankEnvironment("torchrun", 2, 4, 0, 2)),
        ({**PLACE, "LOCAL_WORLD_SIZE": "2", environment.STARTER: "local"}, RankEnvironment("local", 2, 4, 0, 2)),
        ({**PLACE, "LOCAL_RANK": "2"}, RankEnvironment("environment", 2, 4, 2, 4)),
        ({**OPEN_MPI, **RENDEZVOUS}, RankEnvironment("mpi", 2, 4, 0, 2)),
        ({**PMI, **RENDEZVOUS}, RankEnvironment("mpi", 2, 4, 0, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, RankEnvironment("mpi", 0, 1, 0, 1)),
        ({**SRUN, **RENDEZVOUS}, RankEnvironment("slurm", 3, 5, 1, 2)),
        (
            {**SRUN, **RENDEZVOUS, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"},
            RankEnvironment("slurm", 4, 5, 0, 1),
        ),
        (SBATCH, RankEnvironment("alone", 0, 1, 0, 1)),
        ({**SBATCH, "SLURM_STEP_NUM_TASKS": "1"}, RankEnvironment("alone", 0, 1, 0, 1)),
        ({**SRUN, **PMI, **RENDEZVOUS}, RankEnvironment("mpi", 2, 4, 0, 2)),  # mpirun that starts its helpers by srun
        ({**SRUN, **RENDEZVOUS, "PMI_RANK": "3", "PMI_SIZE": "5"}, RankEnvironment("slurm", 3, 5, 1, 2)),  # srun --mpi
        ({**SRUN, **DEEPSPEED}, RankEnvironment("deepspeed", 2, 4, 0, 2)),
    ],
)
def test_the_launcher_and_the_place_are_recognised(variables: dict[str, str], found: RankEnvironment) -> None:
    assert discover(variables) == found


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"RANK": None}, ["RANK is not set", "WORLD_SIZE"]),
        ({"WORLD_SIZE": None}, ["WORLD_SIZE is not set"]),
        ({"LOCAL_RANK": None}, ["LOCAL_RANK is not set"]),
        ({"RANK": "two"}, ["RANK='two'", "whole number"]),
        ({"RANK": "-1"}, ["RANK='-1'"]),
        ({"RANK": "4"}, ["RANK=4", "WORLD_SIZE (4)"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE (0)"]),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "(2)"]),
        ({"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE=8", "WORLD_SIZE=4"]),
    ],
)
def test_an_impossible_environment_is_one_line(change: dict[str, str | None], parts: list[str]) -> None:
    merged: dict[str, str | None] = {**TORCHRUN, **change}
    with pytest.raises(LaunchError) as caught:
        discover({name: value for name, value in merged.items() if value is not None})
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_pod_without_a_local_rank_is_alone_on_its_machine(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "visible_gpu_count", lambda variables: gpus)
    assert discover(POD) == RankEnvironment("environment", 1, 2, 0, 1)
    master = {**POD, "RANK": "0", "MASTER_ADDR": "localhost", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert discover(master) == RankEnvironment("environment", 0, 2, 0, 1)


def test_without_a_local_rank_several_gpus_are_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "visible_gpu_count", lambda variables: 4)
    with pytest.raises(LaunchError, match=r"LOCAL_RANK is not set, and 4 GPUs are visible: [^\n]+$"):
        discover(POD)
    assert discover({**POD, "LOCAL_RANK": "1"}) == RankEnvironment("environment", 1, 2, 1, 2)
    with pytest.raises(LaunchError, match="RANK=2 must be less than"):
        discover({**POD, "RANK": "2"})


def test_ranks_that_meet_on_the_loopback_share_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "visible_gpu_count", lambda variables: 0)
    assert discover({**POD, "MASTER_ADDR": "127.0.0.1"}) == RankEnvironment("environment", 1, 2, 1, 2)


@pytest.mark.parametrize(("listed", "count"), [("", 0), ("-1", 0), ("3", 1), ("0,1", 2), ("GPU-8a,GPU-9b", 2)])
def test_visible_gpus_are_counted(listed: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    assert environment.visible_gpu_count({"CUDA_VISIBLE_DEVICES": listed}) == count
    assert environment.visible_gpu_count({"CUDA_VISIBLE_DEVICES": listed, "DS_ACCELERATOR": "cpu"}) == 0


def test_tasks_that_slurm_does_not_count_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"SLURM_STEP_TASKS_PER_NODE='2\(x2\),1' .* SLURM_NODEID=3"):
        discover({**SRUN, **RENDEZVOUS, "SLURM_NODEID": "3"})


def test_what_is_exported_is_discovered_again() -> None:
    exported = dict(DEEPSPEED)
    discover(DEEPSPEED).export(exported)
    assert discover(exported) == discover(DEEPSPEED)
    assert exported["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("given", "threads", "ranks", "wanted"),
    [
        ({}, 3, 4, "3"),
        ({"OMP_NUM_THREADS": "5"}, 0, 4, "5"),
        ({"OMP_NUM_THREADS": "5"}, 2, 4, "2"),
        ({}, 0, 10**6, "1"),
    ],
)
def test_threads(given: dict[str, str], threads: int, ranks: int, wanted: str) -> None:
    prepare_process(given, threads, ranks)
    assert {given[name] for name in environment.THREAD_VARIABLES} == {wanted}


def test_cores_are_shared_among_ranks() -> None:
    variables: dict[str, str] = {}
    prepare_process(variables, 0, 1)
    assert variables["OMP_NUM_THREADS"] == str(environment.usable_cores())


@pytest.mark.parametrize("gpu", [True, False])
def test_deepspeed_is_told_of_the_cpu_where_there_is_no_gpu(
    gpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "GPU_DEVICES", [str(tmp_path if gpu else tmp_path / "missing")])
    monkeypatch.setattr(machine, "_torch_is_cpu_build", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    variables: dict[str, str] = {}
    prepare_process(variables, 1, 1)
    assert variables.get("DS_ACCELERATOR") == (None if gpu else "cpu")
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    assert not machine.has_gpu()
