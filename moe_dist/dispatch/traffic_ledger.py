"""Accounting of the traffic between ranks: `all_to_all.py` records every collective of the dispatch.

Bytes are `rows * row width * element size` of the tensors passed to the collective, for each peer. A rank's rows for
itself are not counted. A message is one non-empty chunk for one peer.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_dist.distributed.links import LinkKind, Links


class Stage(StrEnum):
    """Stage of the dispatch."""

    ONE = "one"  # to the ranks of the chosen clusters
    TWO = "two"  # within a cluster group, to the shards that hold the chosen experts
    FLAT = "flat"  # standard expert parallelism: directly to the ranks of the chosen experts


class Payload(StrEnum):
    """Content of an all-to-all."""

    HIDDEN = "hidden"  # token vectors and expert outputs
    ROUTING = "routing"  # logits, gates and slots that are sent with a token
    COUNTS = "counts"  # numbers of rows, exchanged before the rows


class Direction(StrEnum):
    """Pass of a training step; a recomputed forward pass counts as forward, since it communicates again."""

    FORWARD = "forward"
    BACKWARD = "backward"


class TrafficKey(NamedTuple):
    """Key of one entry of the ledger."""

    layer: int
    stage: Stage
    payload: Payload
    direction: Direction
    peer: int


@dataclass
class Volume:
    """Bytes and messages."""

    bytes: int = 0
    messages: int = 0


class RoutingObserver(Protocol):
    """Observer of every routing decision; for measurements only, since it costs time."""

    def see(self, layer: int, stage: Stage, group: Sequence[int], choice_RK: Tensor, owner_RK: Tensor) -> None:
        """Observe the routing decision of one stage of one layer.

        Args:
            group: global ranks of the stage's group.
            choice_RK: chosen experts, clusters or slots of each row; negative: none.
            owner_RK: index in `group` of the rank that holds each choice.
        """


TOTALS = tuple(product(LinkKind, Payload, Direction))
"""Keys of the totals kept in checkpoints; peers are not among them, because they may differ after a resume."""


@dataclass
class TrafficLedger:
    """Traffic that this rank has sent, by layer, stage, payload, direction and peer.

    Attributes:
        recording: False: traffic is not counted.
        observer: observer of routing decisions, if any.
        carried: bytes and messages sent before the last resume, [len(TOTALS), 2]; only its sum over all ranks is
            meaningful.
        sent: traffic since then.
    """

    summed_over_ranks = ("carried",)

    links: Links
    recording: bool = True
    observer: RoutingObserver | None = None
    carried: Tensor = field(default_factory=lambda: torch.zeros(len(TOTALS), 2, dtype=torch.int64))
    sent: defaultdict[TrafficKey, Volume] = field(default_factory=lambda: defaultdict(Volume))

    def record(
        self,
        layer: int,
        stage: Stage,
        payload: Payload,
        direction: Direction,
        peers: Sequence[int],
        bytes_to: Iterable[int],
    ) -> None:
        """Record one collective that sends `bytes_to[i]` bytes to global rank `peers[i]`."""
        if not self.recording:
            return
        for peer, size in zip(peers, bytes_to, strict=True):
            if size and peer != self.links.rank:
                volume = self.sent[TrafficKey(layer, stage, payload, direction, peer)]
                volume.bytes += size
                volume.messages += 1

    def total(
        self, link: LinkKind | None = None, payload: Payload | None = None, direction: Direction | None = None
    ) -> Volume:
        """Return the sum over all entries, or over those of one kind of link, payload or direction."""
        result = Volume()
        for key, volume in self.sent.items():
            wanted = ((link, self.links.kind(key.peer)), (payload, key.payload), (direction, key.direction))
            if all(asked is None or asked is found for asked, found in wanted):
                result.bytes += volume.bytes
                result.messages += volume.messages
        asked = (link, payload, direction)
        for kinds, (size, messages) in zip(TOTALS, self.carried.tolist(), strict=True):
            if all(one is None or one is found for one, found in zip(asked, kinds, strict=True)):
                result.bytes += size
                result.messages += messages
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bytes and messages so far, [len(TOTALS), 2], which become `carried` after a resume."""
        volumes = [self.total(*kinds) for kinds in TOTALS]
        return {"carried": torch.tensor([[volume.bytes, volume.messages] for volume in volumes], dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Continue from the totals of an earlier process."""
        self.clear()
        self.carried = state["carried"]

    def clear(self) -> None:
        """Reset all counts to zero."""
        self.sent.clear()
        self.carried.zero_()
