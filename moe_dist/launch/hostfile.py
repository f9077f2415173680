"""Machines of a job, read from a host file in DeepSpeed's format."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.errors import LaunchError

THIS_MACHINE = ("localhost", "127.0.0.1")
HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*")


@dataclass(frozen=True)
class Node:
    """One machine of a job.

    Attributes:
        host: name for ssh; None if a scheduler chooses the machine.
        ranks: number of ranks.
    """

    host: str | None
    ranks: int


def read_hostfile(path: Path) -> tuple[Node, ...]:
    """Read lines of `HOST slots=N`; skip empty lines and `#` comments.

    Raises:
        LaunchError: the file cannot be read, or a line is not of that form; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile {path}: cannot be read: {error}") from error
    nodes: list[Node] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9]\d{0,8})", words[1]) if len(words) == 2 else None
        if slots is None or not HOST_NAME.fullmatch(words[0]):
            raise LaunchError(f"--hostfile {path}, line {number}: {line.strip()!r} is not `HOST slots=N`")
        if words[0] in (node.host for node in nodes):
            raise LaunchError(f"--hostfile {path}, line {number}: {words[0]} is listed twice")
        nodes.append(Node(words[0], int(slots[1])))
    if not nodes:
        raise LaunchError(f"--hostfile {path}: lists no host: give lines of `HOST slots=N`")
    return tuple(nodes)


def take(listed: Sequence[Node], nodes: int | None, ranks_per_node: int | None) -> tuple[Node, ...]:
    """Return the first `nodes` machines (None: all) with `ranks_per_node` ranks each (None: as many as slots).

    Raises:
        LaunchError: there are fewer machines, or fewer slots on one of them.
    """
    count = len(listed) if nodes is None else nodes
    if count > len(listed):
        raise LaunchError(f"--nodes {count} is more than the {len(listed)} hosts of the host file")
    taken = listed[:count]
    for node in taken:
        if ranks_per_node is not None and ranks_per_node > node.ranks:
            raise LaunchError(f"--ranks-per-node {ranks_per_node} is more than the slots={node.ranks} of {node.host}")
    return tuple(Node(node.host, ranks_per_node or node.ranks) for node in taken)
