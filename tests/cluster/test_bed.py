"""The bed itself: what the other tests take for granted."""

import time
from pathlib import Path

import pytest

from tests.cluster.bed import HERE, Bed, finish, stop

OTHER_HEADERS = 200  # bytes: frames of address resolution have shorter headers than the counters take off each frame


def test_nodes_have_names_and_addresses_of_their_own(bed: Bed) -> None:
    assert bed.nodes["n1"].run("hostname", "-I").split() == ["10.77.0.11"]
    assert bed.nodes["n2"].run("hostname").strip() == "n2"
    assert bed.nodes["n1"].run("getent", "ahostsv4", "n2").split()[0] == "10.77.0.12"


def test_a_cable_carries_no_more_than_its_rate_and_every_byte_is_counted(bed: Bed) -> None:
    rate = 100e6 / 8
    for name in ("n1", "n2"):
        bed.shape(name, "100mbit")
    sink = bed.nodes["n2"].start("python", HERE / "transfer.py", "receive")
    before, size = bed.nodes["n1"].counters(), 20_000_000
    seconds = float(bed.nodes["n1"].run("python", HERE / "transfer.py", "send", "n2", str(size)))
    payload = bed.nodes["n1"].counters().payload_since(before)
    assert finish(sink, 20).strip() == str(size)
    for name in ("n1", "n2"):
        bed.shape(name, "1gbit")
    assert size - OTHER_HEADERS <= payload < 1.01 * size
    assert seconds > 0.9 * size / rate


@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="cables with latency need /dev/net/tun")
def test_a_cable_may_have_latency(possible: None, tmp_path: Path) -> None:
    delay = 0.004
    with Bed(tmp_path / "bed", delay=round(delay * 1e6)) as far:
        sink = far.nodes["n2"].start("python", HERE / "transfer.py", "receive")
        before = far.nodes["n1"].counters()
        assert float(far.nodes["n1"].run("python", HERE / "transfer.py", "send", "n2", "1000000")) > 0
        assert finish(sink, 20).strip() == "1000000"
        assert far.nodes["n1"].counters().payload_since(before) >= 1_000_000 - OTHER_HEADERS
        far.nodes["n1"].run("python", HERE / "transfer.py", "reach", "n2")  # once for the address
        times = [float(far.nodes["n1"].run("python", HERE / "transfer.py", "trip", "n2")) for _ in range(3)]
    assert all(4 * delay <= seconds for seconds in times)


def test_an_unplugged_node_is_silent_until_it_is_plugged_in(bed: Bed) -> None:
    ping = ("python", HERE / "transfer.py", "reach", "n2")
    assert bed.nodes["n1"].run(*ping).strip() == "reached"
    bed.unplug("n2")
    try:
        assert bed.nodes["n1"].run(*ping).strip() == "silence"
    finally:
        bed.plug("n2")
    time.sleep(0.2)
    assert bed.nodes["n1"].run(*ping).strip() == "reached"


def test_commands_see_only_their_own_node(bed: Bed) -> None:
    sleeper = bed.nodes["n2"].start("sleep", "77")
    try:
        assert "sleep\x0077" not in _commands(bed, "n1")
        assert "sleep\x0077" in _commands(bed, "n2")
    finally:
        stop(sleeper)


def _commands(bed: Bed, name: str) -> str:
    return bed.nodes[name].run("sh", "-c", "cat /proc/[0-9]*/cmdline")


def test_ssh(ssh: Bed) -> None:
    assert ssh.head.run("ssh", "n2", "hostname").strip() == "n2"


def test_a_job_of_slurm_spans_the_nodes(slurm: Bed) -> None:
    told = slurm.head.run("srun", "-N2", "--ntasks-per-node=2", "sh", "-c", "echo $(hostname) $SLURM_PROCID")
    assert sorted(told.split("\n"))[1:] == ["n1 0", "n1 1", "n2 2", "n2 3"]
