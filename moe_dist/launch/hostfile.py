"""Machines of a job, read from a host file in DeepSpeed's format."""

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.errors import LaunchError

THIS_MACHINE = ("localhost", "127.0.0.1")
MOST_SLOTS = 4096
"""Limit of a machine's ranks."""
RESOLVE_SECONDS = 3.0
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
    lines_of: list[int] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if slots is None or not HOST_NAME.fullmatch(words[0]):
            raise LaunchError(f"--hostfile {path}, line {number}: {line.strip()!r} is not `HOST slots=N`")
        if len(slots[1]) > len(str(MOST_SLOTS)) or int(slots[1]) > MOST_SLOTS:
            shown = slots[1][:20]
            raise LaunchError(f"--hostfile {path}, line {number}: slots={shown} must be <= {MOST_SLOTS}")
        nodes.append(Node(words[0], int(slots[1])))
        lines_of.append(number)
    if not nodes:
        raise LaunchError(f"--hostfile {path}: lists no host: give lines of `HOST slots=N`")
    _require_different(path, [str(node.host) for node in nodes], lines_of)
    return tuple(nodes)


def _require_different(path: Path, hosts: Sequence[str], lines_of: Sequence[int]) -> None:
    """Reject a machine that is listed twice, also under two names of one address."""
    first: dict[str, int] = {}
    for index, names in enumerate(_identities(hosts)):
        for name in names:
            if name in first:
                other = hosts[first[name]]
                which = "is listed twice" if other == hosts[index] else f"is the machine of {other} ({name})"
                raise LaunchError(
                    f"--hostfile {path}, line {lines_of[index]}: {hosts[index]} {which}, see line "
                    f"{lines_of[first[name]]}: give each machine once, with all of its slots"
                )
        first |= dict.fromkeys(names, index)


def _identities(hosts: Sequence[str]) -> list[set[str]]:
    """Return each host's name without user and case, and its addresses as far as they are known in time."""
    plain = [host.rpartition("@")[2].rstrip(".").lower() for host in hosts]
    found: dict[str, set[str]] = {}
    threads = [threading.Thread(target=_resolve, args=(host, found), daemon=True) for host in plain]
    if len(hosts) > 1:  # names that only ssh's configuration has are not resolved, and differ by name alone
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + RESOLVE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    return [{host, *found.get(host, ())} for host in plain]


def _resolve(host: str, found: dict[str, set[str]]) -> None:
    if host in THIS_MACHINE or host == socket.gethostname().lower():
        found[host] = {"this machine"}
        return
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return
    loopback = any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    found[host] = {"this machine"} if loopback else addresses


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
