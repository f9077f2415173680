"""Where ranks meet, as given or as found."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.errors import LaunchError
from moe_dist.launch.environment import INIT_METHOD, RankEnvironment
from moe_dist.launch.rendezvous import HIGHEST_PORT, LOWEST_PORT, describe, first_host, resolve

SLURM = RankEnvironment("slurm", 3, 4, 1, 2)
MPI = RankEnvironment("mpi", 2, 4, 0, 2)
PLAIN = RankEnvironment("environment", 2, 4, 2, 4)
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_NODELIST": "x"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("gpu[3,9-11]", "gpu3"),
        ("rack[1-2]node[05-06]", "rack1node05"),
        ("a[1-2]-ib,b", "a1-ib"),
    ],
)
def test_first_host_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_slurm_says_where_its_steps_meet() -> None:
    variables = dict(STEP)
    resolve(SLURM, variables)
    assert variables["MASTER_ADDR"] == "gpu003"
    assert LOWEST_PORT <= int(variables["MASTER_PORT"]) <= HIGHEST_PORT
    assert describe(SLURM, variables).startswith("started by srun: 4 ranks, 2 on this node; rendezvous at gpu003:")
    reserved = {**STEP, "SLURM_STEP_RESV_PORTS": "12001-12004"}
    resolve(SLURM, reserved)
    assert reserved["MASTER_PORT"] == "12001"


@given(st.integers(1, 10**8), st.integers(0, 28))
def test_steps_of_a_job_meet_at_different_ports(job: int, step: int) -> None:
    ports = set()
    for number in (step, step + 1, step + 2):
        variables = {**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(number)}
        resolve(SLURM, variables)
        ports.add(int(variables["MASTER_PORT"]))
    assert len(ports) == 3
    assert all(LOWEST_PORT <= port <= HIGHEST_PORT for port in ports)


def test_what_is_given_wins() -> None:
    variables = {**STEP, "MASTER_ADDR": "other", "MASTER_PORT": "5"}
    resolve(SLURM, variables)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("other", "5")
    half = {**STEP, "MASTER_PORT": "5"}
    resolve(SLURM, half)
    assert (half["MASTER_ADDR"], half["MASTER_PORT"]) == ("gpu003", "5")


@pytest.mark.parametrize("place", [SLURM, PLAIN])
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "MASTER_ADDR is not set: export MASTER_ADDR .* and MASTER_PORT"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
    ],
)
def test_no_place_to_meet_is_one_line(place: RankEnvironment, variables: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        resolve(place, variables)


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        (RankEnvironment("alone", 0, 1, 0, 1), {"MASTER_PORT": "x"}),
        (RankEnvironment("mpi", 0, 1, 0, 1), {}),
        (PLAIN, {INIT_METHOD: "file:///somewhere"}),
    ],
)
def test_where_nothing_is_needed_nothing_is_set(place: RankEnvironment, variables: dict[str, str]) -> None:
    before = dict(variables)
    resolve(place, variables)
    assert variables == before


def _fake_mpi(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, **more: Any) -> SimpleNamespace:
    package, mpi = ModuleType("mpi4py"), SimpleNamespace(finalized=False, **more)
    mpi.COMM_WORLD = SimpleNamespace(rank=rank, size=size, bcast=lambda value: value or ("n1", 4321))
    mpi.Finalize = lambda: setattr(mpi, "finalized", True)
    package.MPI = mpi  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    return mpi


def test_mpi_ranks_learn_the_place_from_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    mpi, variables = _fake_mpi(monkeypatch, 2, 4), dict[str, str]()
    resolve(MPI, variables)
    assert variables == {"MASTER_ADDR": "n1", "MASTER_PORT": "4321"}
    assert mpi.finalized


def test_rank_0_of_one_machine_names_the_loopback_and_a_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_mpi(monkeypatch, 0, 2)
    variables: dict[str, str] = {}
    resolve(RankEnvironment("mpi", 0, 2, 0, 2), variables)
    assert variables["MASTER_ADDR"] == "127.0.0.1"
    assert int(variables["MASTER_PORT"]) > 0


def test_an_mpi_that_is_not_mpiruns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_mpi(monkeypatch, 0, 1)
    with pytest.raises(LaunchError, match="mpi4py sees rank 0 of 1 in rank 2 of 4: it uses another MPI"):
        resolve(MPI, {})


def test_without_mpi4py_one_is_told_what_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py", raising=False)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    (tmp_path / "mpi4py.py").write_text("raise RuntimeError('cannot load MPI library')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LaunchError, match=r"MASTER_ADDR is not set.*mpi4py.*fails: cannot load MPI library"):
        resolve(MPI, dict(os.environ) | {"MASTER_ADDR": "", "MASTER_PORT": ""})
