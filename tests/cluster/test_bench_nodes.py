"""`moe-dist bench layer --hostfile`: whole layers on two real nodes, with and without chunks."""

import json
from pathlib import Path

import pytest

from moe_dist.benchmarks.layer.spec import overlapped
from tests.cluster.bed import Bed
from tests.cluster.bench_nodes import bench

TINY = ("--tokens=64", "--hidden=32", "--expert-hidden=48", "--experts=8", "--rank=2", "--repeats=1", "--top-k=2")


def test_layers_are_measured_between_nodes(ssh: Bed, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    before = {name: ssh.nodes[name].counters() for name in ssh.workers}
    output = bench(ssh, tmp_path, (*TINY, "--overlap=auto", "--overlap=2", f"--json={file}"), timeout=100)
    figures = json.loads(file.read_text())
    (case,) = figures["cases"]
    assert figures["ranks"] == 2, output
    assert case["hops"][overlapped("2")]["chunks"] == 2
    assert case["hops"][overlapped("auto")]["speed"]["latency"] > 0
    sent = case["bytes_per_token"]
    assert sent["clustered m=1"]["counted"] == pytest.approx(sent["clustered m=1"]["floor"], abs=1)
    assert sent[overlapped("2")] == sent["clustered m=1"]
    for name in ssh.workers:  # one rank is on each, and sends in a warming, a timed and a counted round
        at_least = 3 * 64 * sum(layer["counted"] for layer in sent.values())
        assert ssh.nodes[name].counters().payload_since(before[name]) > at_least
