"""Every launcher on two real nodes: the ranks meet, and when one is lost all end everywhere."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import HERE, Bed, Node, finish, stop, wait_until
from tests.cluster.conftest import require
from tests.cluster.services import start_ssh

ENTRY = HERE / "rendezvous_rank.py"
LAUNCH = HERE / "launch_rendezvous.py"
LIMIT = 170.0
TOLD = "MOE_DIST_TEST_AFTER_RENDEZVOUS"  # travels to the other nodes, as all variables of this prefix
RANKS = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl_tcp_if_include": "eth0",
    "OMPI_MCA_oob_tcp_if_include": "eth0",
}
EVERYWHERE = ["n1", "n1", "n2", "n2"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "a run.yaml"  # a space, which no launcher may split
    path.write_text("train: {global_batch_size: 12}\n")
    return path


def assert_met(output: str, started_by: str, seed: int = 0) -> None:
    told = re.findall(r"rank (\d) met (\[.*\]), seed (\d+)", output)
    assert sorted(told) == [(str(rank), str(EVERYWHERE), str(seed)) for rank in range(4)], output
    assert output.count(f"started by {started_by}: 4 ranks, 2 on this node; rendezvous at ") == 1, output


def on_both(bed: Bed, *words: str | Path) -> str:
    """Runs a command on both nodes at once; `{node}` in a word becomes 0 and 1."""
    started = [
        bed.nodes[name].start(*(str(word).replace("{node}", str(number)) for word in words), env=RANKS)
        for number, name in enumerate(("n1", "n2"))
    ]
    outputs = [finish(process, LIMIT) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    return "\n".join(outputs)


def test_torchrun(bed: Bed, config: Path) -> None:
    meet = ("--nnodes=2", "--node-rank={node}", "--nproc-per-node=2", "--master-addr=n1", "--master-port=29400")
    assert_met(on_both(bed, "torchrun", *meet, ENTRY, config, "seed=5"), "torchrun", 5)


def test_deepspeed_without_ssh(bed: Bed, config: Path, hostfile: Path) -> None:
    place = ("--no_ssh", "--node_rank={node}", "--master_addr=n1", "--master_port=29401")
    assert_met(on_both(bed, "deepspeed", "--hostfile", hostfile, *place, ENTRY, config, "seed=5"), "deepspeed", 5)


def test_deepspeed_with_a_hostfile(ssh: Bed, config: Path, hostfile: Path, tmp_path: Path) -> None:
    require("pdsh")
    environment = tmp_path / "environment"
    environment.write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    variables = {**RANKS, "DS_ENV_FILE": str(environment)}
    command = ("deepspeed", "--hostfile", hostfile, ENTRY, config, "seed=5")
    assert_met(ssh.head.run(*command, timeout=LIMIT, env=variables), "deepspeed", 5)


def test_mpirun(ssh: Bed, config: Path) -> None:
    require("mpirun")
    command = ("mpirun", "-n", "4", "--host", "n1:2,n2:2", "--bind-to", "none", "-x", "PATH", "-x", "OMP_NUM_THREADS")
    assert_met(ssh.nodes["n1"].run(*command, "python", ENTRY, config, timeout=LIMIT, env=RANKS), "mpirun")


def test_srun(slurm: Bed, config: Path) -> None:
    command = ("srun", "--nodes=2", "--ntasks-per-node=2", "python", "-u", ENTRY, config)
    assert_met(slurm.head.run(*command, timeout=LIMIT, env=RANKS), "srun")


@pytest.mark.parametrize(
    ("launcher", "started_by"),
    [("local", "moe-dist"), ("torchrun", "torchrun"), ("deepspeed", "deepspeed"), ("mpi", "mpirun")],
)
def test_launch_on_two_nodes(ssh: Bed, config: Path, hostfile: Path, launcher: str, started_by: str) -> None:
    if launcher == "mpi":
        require("mpirun")
    output = ssh.head.run("python", LAUNCH, launcher, hostfile, config, "seed=5", timeout=LIMIT, env=RANKS)
    assert_met(output, started_by, 5)


def test_the_doctor_examines_all_nodes(ssh: Bed, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    command = ("moe-dist", "doctor", "--hostfile", tmp_path / "hosts")
    lines = ssh.head.run(*command, timeout=LIMIT, env=RANKS).splitlines()
    told = {line[6:19].strip(): line for line in lines if line.split()[0] in ("ok", "warn", "fail")}
    assert "2 on 2 node(s): n1, n2" in told["ranks"]
    assert "n1 is 10.77.0.11, n2 is 10.77.0.12" in told["host names"]
    speed = re.search(r"all-to-all ([\d,]+) MB/s out of each node", told["between nodes"])
    assert speed is not None
    assert 0 < int(speed[1].replace(",", "")) < 150  # the cables carry 1 Gbit/s, after a burst
    assert not any(line.startswith("fail") for line in told.values()), told


def wait_for_ranks(launch: "subprocess.Popen[str]") -> None:
    """Returns when all four have told whom they met."""
    assert launch.stdout is not None
    told, lines = 0, []
    while told < 4:
        lines.append(launch.stdout.readline())
        assert lines[-1], f"the job ended: {lines}"
        told += " met [" in lines[-1]


def ranks_on(node: Node) -> list[str]:
    """Commands that belong to a job and still run on a node."""
    shown = node.run("sh", "-c", r"for f in /proc/[0-9]*/cmdline; do tr '\0' ' ' <$f; echo; done 2>/dev/null")
    return [line for line in shown.splitlines() if "rendezvous_rank" in line or "moe_dist.launch." in line]


def assert_nothing_left(bed: Bed) -> None:
    for node in bed.nodes.values():
        wait_until(lambda node=node: not ranks_on(node), 15, f"the end of all ranks on {node.name}")  # type: ignore[misc]


@pytest.mark.parametrize("launcher", ["local", "torchrun", "deepspeed", "mpi"])
def test_one_rank_that_dies_ends_the_job_on_all_nodes(ssh: Bed, config: Path, hostfile: Path, launcher: str) -> None:
    if launcher == "mpi":
        require("mpirun")
    started = time.monotonic()
    output = ssh.head.run(
        "python", LAUNCH, launcher, hostfile, config, timeout=LIMIT, code=None, env=RANKS | {TOLD: "exit:3"}
    )
    assert_met(output, {"local": "moe-dist", "mpi": "mpirun"}.get(launcher, launcher))
    assert time.monotonic() - started < LIMIT
    if launcher != "mpi":
        assert re.fullmatch(r"moe-dist: rank 3 failed: process \d+ .*(exit code 3|killed).*", output.splitlines()[-1])
    assert_nothing_left(ssh)


def test_ctrl_c_ends_the_job_on_all_nodes(ssh: Bed, config: Path, hostfile: Path) -> None:
    command = ("python", LAUNCH, "local", hostfile, config)
    launch = ssh.head.start(*command, env=RANKS | {TOLD: "sleep"})
    try:
        wait_for_ranks(launch)
        supervisor = ssh.head.run("pgrep", "-f", "launch_rendezvous.py local").split()[0]
        ssh.head.run("kill", f"-{signal.SIGINT.value}", supervisor)
        output = finish(launch, 30)
        assert launch.returncode == 130, output
        assert output.splitlines()[-1] == "moe-dist: interrupted"
        assert_nothing_left(ssh)
    finally:
        stop(launch)


@pytest.fixture
def fragile(possible: None, tmp_path: Path) -> Iterator[Bed]:
    """A bed of the test's own, which it may break."""
    with Bed(tmp_path / "bed") as standing:
        start_ssh(standing)
        yield standing


def test_a_node_that_is_lost_ends_the_job(fragile: Bed, config: Path, hostfile: Path) -> None:
    command = ("python", LAUNCH, "local", hostfile, config)
    launch = fragile.head.start(*command, env=RANKS | {TOLD: "sleep"})
    try:
        wait_for_ranks(launch)
        fragile.crash("n2")
        output = finish(launch, 60)
        assert launch.returncode == 1, output
        assert output.splitlines()[-1].startswith("moe-dist: error: ssh to n2 ended without its ranks")
        assert_nothing_left(fragile)
    finally:
        stop(launch)
