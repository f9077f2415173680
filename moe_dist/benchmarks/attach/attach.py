"""Run of a command whose Python processes count their collectives, and the figures of all of them."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moe_dist.errors import ConfigError, TrainingError

INSIDE = Path(__file__).parent / "inside"
FOLDER = "MOE_DIST_ATTACH"


@dataclass
class CountedCalls:
    """Calls of one collective at one line, by groups of one size, summed over all ranks.

    Attributes:
        nodes: largest number of nodes that one of the groups spans.
        ranks: number of ranks that made the calls.
        sent: bytes sent between ranks.
        between_nodes: those of them that left a node.
        seconds: from the call to its end, summed over calls and ranks.
    """

    operation: str
    size: int
    nodes: int
    site: str
    backward: bool
    calls: int = 0
    sent: float = 0.0
    between_nodes: float = 0.0
    seconds: float = 0.0
    ranks: int = 0


@dataclass(frozen=True)
class AttachedRun:
    """Outcome of a measured command."""

    status: int
    ranks: int
    calls: list[CountedCalls] = field(default_factory=list)


def run_attached(command: Sequence[str]) -> AttachedRun:
    """Run a command with counting in all of its Python processes, and read what they counted.

    Raises:
        ConfigError: the command cannot be started.
        TrainingError: none of its processes used torch.distributed, or none that inherited the environment.
    """
    with TemporaryDirectory(prefix="moe-dist-attach-") as name:
        path = [str(INSIDE), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {**os.environ, FOLDER: name, "PYTHONPATH": os.pathsep.join(path)}
        try:
            status = subprocess.run(command, env=variables, check=False).returncode
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started: {error.strerror}") from error
        records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(name).glob("*.json"))]
    if not records:
        raise TrainingError(
            f"{' '.join(command)} (exit status {status}) has made no collective that could be counted: its processes "
            "must be started here, and keep PYTHONPATH and MOE_DIST_ATTACH"
        )
    return AttachedRun(status, len({record["rank"] for record in records}), merged(records))


def merged(records: Sequence[Mapping[str, Any]]) -> list[CountedCalls]:
    """Return the calls of all processes, those with the most bytes first."""
    node_of = {record["rank"]: record["node"] for record in records}
    found: dict[tuple[Any, ...], CountedCalls] = {}
    for record in records:
        for call in record["calls"]:
            nodes = len({node_of.get(rank, rank) for rank in call["ranks"]})
            key = (call["operation"], len(call["ranks"]), call["site"], call["backward"])
            total = found.setdefault(key, CountedCalls(key[0], key[1], nodes, key[2], key[3]))
            total.nodes = max(total.nodes, nodes)
            total.ranks += 1
            total.calls += call["calls"]
            total.seconds += call["seconds"]
            for peer, size in call["to_rank"].items():
                total.sent += size
                total.between_nodes += size if node_of.get(int(peer)) != record["node"] else 0.0
    return sorted(found.values(), key=lambda calls: (-calls.sent, calls.operation, calls.site))
