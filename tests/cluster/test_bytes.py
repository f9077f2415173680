"""The project's account of bytes between nodes against the counters of the nodes' own interfaces."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import HERE, ROOT, Bed, Counters, finish

LIMIT = 170.0
SCATTERS = 10 / 25
"""Reduce-scatters among the passes around a tensor group: 2 of 5 of each of four layers, 2 of 5 beside the layers.

gloo makes an all-reduce of each, which sends twice the bytes of a ring.
"""


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


@pytest.mark.parametrize(
    ("ranks_of_node", "cases"),
    [
        (
            1,
            [
                ["world.tensor=2"],
                ["world.context=2"],
                ["world.pipeline=2"],
                ["world.data=2", "world.zero_stage=0"],
                ["world.data=2", "world.zero_stage=2"],
                ["world.cluster=2"],
            ],
        ),
        (2, [["world.pipeline=2", "world.tensor=2"], ["world.cluster=2", "world.context=2"]]),
    ],
    ids=["one rank a node", "two ranks a node"],
)
def test_bytes_of_each_axis_agree_with_the_interfaces(
    shaped: Bed, tmp_path: Path, ranks_of_node: int, cases: list[list[str]]
) -> None:
    started = []
    for number, name in enumerate(shaped.workers):
        meet = ("--nnodes=2", f"--node-rank={number}", f"--nproc-per-node={ranks_of_node}", "--master-addr=n1")
        script = (HERE / "count_step_bytes.py", tmp_path, json.dumps(cases))
        command = ("torchrun", *meet, "--master-port=29403", *script)
        started.append(shaped.nodes[name].start(*command, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}))
    outputs = [finish(process, LIMIT) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2 * ranks_of_node)]
    off = []
    for at, words in enumerate(cases):
        for first in range(0, len(told), ranks_of_node):
            of_node = [told[first + local]["found"][at] for local in range(ranks_of_node)]
            by_purpose = {name: sum(rank["sent"][name] for rank in of_node) for name in of_node[0]["sent"]}
            predicted = sum(by_purpose.values()) + SCATTERS * by_purpose["tensor"]
            payload = Counters(of_node[0]["bytes"], of_node[0]["packets"]).payload_since(Counters(0, 0))
            line = f"{words} {told[first]['node']}: {by_purpose}, interface {payload}, {payload / predicted - 1:+.2%}"
            print(line)
            if payload != pytest.approx(predicted, rel=0.03):
                off.append(line)
    assert not off, "\n".join(off)
