"""`measure attach`: collectives of a program that knows nothing of it, bytes by hand."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dist.benchmarks.attach.attach import CountedCalls, merged, run_attached
from moe_dist.cli import app
from moe_dist.errors import ConfigError, TrainingError

pytestmark = pytest.mark.timeout(120)
PROGRAM = Path(__file__).parent / "attached" / "program.py"
START = (
    "import subprocess, sys\n"
    "ranks = [subprocess.Popen([sys.executable, sys.argv[1], sys.argv[2], str(rank), '3']) for rank in range(3)]\n"
    "sys.exit(max(rank.wait() for rank in ranks))"
)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[CountedCalls]:
    folder = tmp_path_factory.mktemp("attach")
    run = run_attached([sys.executable, "-c", START, str(PROGRAM), str(folder / "store")])
    assert (run.status, run.ranks) == (0, 3)
    return run.calls


def _of(counted: list[CountedCalls], word: str) -> list[CountedCalls]:
    lines = PROGRAM.read_text().splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if word in line]
    return [one for one in counted if any(f"program.py:{number} " in one.site for number in numbers)]


@pytest.mark.parametrize(
    ("line", "operation", "size", "calls", "sent"),
    [
        ("dist.all_reduce(x)", "all-reduce", 3, 3, 3 * 2 * 2 / 3 * 48),  # each of 3 ranks sends 2 x 2/3 of 48 bytes
        ("async_op=True", "all-reduce", 3, 3, 3 * 2 * 2 / 3 * 48),
        ("dist.all_gather_into_tensor", "all-gather", 3, 3, 3 * 2 * 48),
        ("dist.reduce_scatter_tensor", "reduce-scatter", 3, 3, 3 * 2 / 3 * 48),
        ("dist.broadcast", "broadcast", 3, 3, 2 * 48),  # the last in the chain sends nothing
        ("dist.all_to_all_single", "all-to-all", 3, 3, 4 * ((4 + 6) + (2 + 6) + (2 + 4))),  # not to itself
        ("dist.send", "send", 3, 1, 20),
        ("group=even", "all-reduce", 2, 2, 2 * 2 / 2 * 48),
    ],
)  # fmt: skip
def test_bytes_are_those_by_hand(
    counted: list[CountedCalls], line: str, operation: str, size: int, calls: int, sent: float
) -> None:
    (found,) = _of(counted, line)
    assert (found.operation, found.size, found.calls, found.backward) == (operation, size, calls, False)
    assert found.sent == pytest.approx(sent)
    assert found.between_nodes == 0
    assert found.nodes == 1
    assert "main" in found.site
    assert found.seconds > 0


def test_gradients_that_torch_reduces_in_its_own_code_are_counted(counted: list[CountedCalls]) -> None:
    (found,) = [one for one in _of(counted, ".backward()") if one.operation == "all-reduce"]
    assert found.backward
    assert found.sent == pytest.approx(3 * 2 * 2 / 3 * 24)  # six weights


def test_links_between_nodes_are_told_apart() -> None:
    """Ranks 0 and 1 on node a, rank 2 on node b: two of the ring's three messages leave a node."""
    call = {"operation": "all-reduce", "ranks": [0, 1, 2], "site": "x.py:1 f", "backward": True, "calls": 2}
    places = [(0, "a", 1), (1, "a", 2), (2, "b", 0)]
    records = [
        {"rank": rank, "node": node, "calls": [{**call, "seconds": 0.5, "to_rank": {str(peer): 10.0}}]}
        for rank, node, peer in places
    ]
    (found,) = merged(records)
    assert (found.calls, found.ranks, found.nodes) == (6, 3, 2)
    assert (found.sent, found.between_nodes, found.seconds) == (30, 20, 1.5)


def test_the_command_passes_the_exit_status_on_and_writes_figures(tmp_path: Path) -> None:
    code = (
        "import torch, torch.distributed as d\n"
        f"d.init_process_group('gloo', store=d.FileStore('{tmp_path}/s', 1), rank=0, world_size=1)\n"
        "d.all_reduce(torch.ones(1))\nraise SystemExit(3)"
    )
    words = ["measure", "attach", "--json", str(tmp_path / "f.json"), "--", sys.executable, "-c", code]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 3, outcome.output
    assert "1 ranks sent 0 bytes" in outcome.output
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [call["operation"] for call in figures["calls"]] == ["all-reduce"]


def test_programs_that_cannot_be_measured_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="no-such-program cannot be started: No such file"):
        run_attached(["no-such-program"])
    with pytest.raises(TrainingError, match="has made no collective that could be counted"):
        run_attached([sys.executable, "-c", "print()"])
