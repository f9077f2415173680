"""The project's account of bytes between nodes against the counters of the nodes' own interfaces."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import HERE, ROOT, Bed, Counters, finish

LIMIT = 170.0


@pytest.fixture
def shaped(bed: Bed) -> Iterator[Bed]:
    """Cables of 200 Mbit/s: on an unshaped one TCP sends some packets twice, which the interface counts too."""
    for name in bed.workers:
        bed.shape(name, "200mbit")
    yield bed
    for name in bed.workers:
        bed.shape(name, "1gbit")


def test_the_ledger_agrees_with_the_interfaces(shaped: Bed, tmp_path: Path) -> None:
    started = []
    for number, name in enumerate(shaped.workers):
        meet = ("--nnodes=2", f"--node-rank={number}", "--nproc-per-node=2", "--master-addr=n1", "--master-port=29402")
        command = ("torchrun", *meet, HERE / "count_bytes.py", tmp_path)
        started.append(shaped.nodes[name].start(*command, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}))
    outputs = [finish(process, LIMIT) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    for ranks in (told[:2], told[2:]):
        assert ranks[0]["node"] == ranks[1]["node"]
        ledger = sum(rank["ledger"] for rank in ranks)
        payload = Counters(ranks[0]["bytes"], ranks[0]["packets"]).payload_since(Counters(0, 0))
        print(f"{ranks[0]['node']}: ledger {ledger}, interface {payload}, {payload / ledger - 1:+.2%}")
        assert ledger > 10_000_000
        assert payload == pytest.approx(ledger, rel=0.03)
