"""Kind of link between two ranks: none (the rank itself), within a node, or between nodes."""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
import torch.distributed as dist

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LinkKind(StrEnum):
    """Kind of link that a message uses."""

    SELF = "self"
    INTRA_NODE = "intra_node"
    INTER_NODE = "inter_node"


@dataclass(frozen=True)
class Links:
    """Links between this rank and its peers.

    Attributes:
        node_of_rank: number of the node of each rank.
    """

    rank: int
    node_of_rank: tuple[int, ...]

    def kind(self, peer: int) -> LinkKind:
        """Return the kind of link between this rank and `peer` (global rank)."""
        if peer == self.rank:
            return LinkKind.SELF
        same_node = self.node_of_rank[peer] == self.node_of_rank[self.rank]
        return LinkKind.INTRA_NODE if same_node else LinkKind.INTER_NODE

    @classmethod
    def alone(cls) -> "Links":
        """Return the links of a single process without peers."""
        return cls(0, (0,))

    @classmethod
    def one_node(cls, rank: int, ranks: int) -> "Links":
        """Return the links of ranks whose nodes are not known: all count as one node."""
        return cls(rank, (0,) * ranks)

    @classmethod
    def discover(cls, device: torch.device) -> "Links":
        """Identify the node of every rank by host name and boot id; collective over all ranks."""
        digest = hashlib.sha256(_node_identity().encode()).digest()
        mine = torch.tensor([int.from_bytes(digest[:7], "big")], device=device)
        nodes = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(nodes, mine)
        return cls(dist.get_rank(), _numbered([int(node) for node in nodes]))


def _node_identity() -> str:
    """Return host name and boot id: host names may be equal on all nodes, boot ids in containers of one kernel."""
    try:
        return f"{socket.gethostname()} {BOOT_ID.read_text().strip()}"
    except OSError:
        return socket.gethostname()


def _numbered(identifiers: Sequence[int]) -> tuple[int, ...]:
    """Number the nodes from 0 in the order of their first rank."""
    order = {node: i for i, node in enumerate(dict.fromkeys(identifiers))}
    return tuple(order[node] for node in identifiers)
