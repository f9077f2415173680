"""The account of what crosses between ranks: `channel.py` enters every collective of the dispatch here.

Bytes are `rows * row width * element size` of the tensors handed to the collective, towards each peer; what a rank
sends to itself is never counted. A message is one non-empty chunk towards one peer.
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
    """Which hop of the dispatch."""

    ONE = "one"  # to the ranks of the chosen clusters
    TWO = "two"  # inside a cluster group, to the shards that hold the chosen experts
    FLAT = "flat"  # standard: straight to the ranks of the chosen experts


class Payload(StrEnum):
    """What is carried."""

    HIDDEN = "hidden"  # token vectors and expert outputs
    ROUTING = "routing"  # logits, gates and slots that travel with a token
    COUNTS = "counts"  # how many rows follow


class Direction(StrEnum):
    """Pass of the step; a recomputed forward pass counts as forward, since it crosses again."""

    FORWARD = "forward"
    BACKWARD = "backward"


class TrafficKey(NamedTuple):
    """What one entry of the account is about."""

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
    """Is shown every routing decision; for measurements, since it costs time."""

    def see(self, layer: int, stage: Stage, group: Sequence[int], choice_RK: Tensor, home_RK: Tensor) -> None:
        """One hop of one layer.

        Args:
            group: global ranks of the hop's group.
            choice_RK: what each row goes to (experts, clusters or slots), negative: nothing.
            home_RK: the index in `group` of the rank that holds it.
        """


TOTALS = tuple(product(LinkKind, Payload, Direction))
"""What an earlier process's account is kept by: the peers it had may not be those of this one."""


@dataclass
class TrafficLedger:
    """What this rank has sent, by layer, stage, payload, direction and peer, while `recording`.

    After a resume `carried` holds what was sent before it, by `TOTALS`; of that only the sum over all ranks means
    something.
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
        """Enters one collective: `bytes_to[i]` bytes towards global rank `peers[i]`."""
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
        """Sum over all entries, or over those of one kind of link, payload or direction."""
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
        """Bytes and messages so far, [len(TOTALS), 2]: what `carried` is after a resume."""
        volumes = [self.total(*kinds) for kinds in TOTALS]
        return {"carried": torch.tensor([[volume.bytes, volume.messages] for volume in volumes], dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Goes on from an earlier process's account."""
        self.clear()
        self.carried = state["carried"]

    def clear(self) -> None:
        """Forgets all that was counted."""
        self.sent.clear()
        self.carried.zero_()
