"""Measurement of a clustered layer's stage-one all-to-all and of its experts, to choose the number of chunks.

Shapes: R rows, D hidden.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from moe_dist.dispatch.all_to_all import PendingAllToAll
from moe_dist.dispatch.chunked_overlap import ExchangeSpeed
from moe_dist.dispatch.traffic_ledger import Direction, Payload
from moe_dist.moe.clustered_moe import ClusteredMoE

MOST_ROWS = 512
"""Largest number of rows measured; times of more rows are extrapolated."""
PART = 4
"""Divisor of the rows for a second measurement, from which the time that does not depend on the rows follows."""
ROUNDS = 5
"""Number of measurements of each part; the fastest counts."""


def measure_exchange_speed(layer: ClusteredMoE, tokens: int) -> ExchangeSpeed:
    """Time the layer's all-to-all and its experts, separately and overlapped; collective over all ranks.

    Every figure is the minimum of `ROUNDS` measurements, which excludes temporary disturbances, on the slowest rank, so
    that it is the same on all ranks. Loads and traffic are not counted. The rows are spread evenly over the ranks.

    Args:
        tokens: tokens of a rank's micro-batch.
    """
    probe = _Probe(layer, tokens)
    rows = probe.rows
    parts = (
        lambda: probe.exchange(probe.ranks).wait(),
        lambda: probe.exchange(rows).wait(),
        lambda: probe.compute(rows),
        lambda: probe.compute(rows // PART),
        lambda: probe.both(rows),
    )
    rounds = [[_seconds(part) for part in parts] for _ in range(ROUNDS + 1)][1:]  # the first warms up
    timed = [min(seconds) for seconds in zip(*rounds, strict=True)]
    slowest = torch.tensor(timed, dtype=torch.float64, device=probe.x_RD.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    latency, exchanged, computed, computed_part, both = slowest.tolist()
    per_row = max(0.0, computed - computed_part) / (rows - rows // PART)
    clusters = layer.moe.top_clusters  # per token, on at most as many ranks
    hidden = (exchanged + computed - both) / min(exchanged, computed)
    return ExchangeSpeed(
        latency=latency,
        exchange=max(0.0, exchanged - latency) / rows * tokens * min(clusters, probe.ranks),
        compute=per_row * tokens * clusters,
        chunk=max(0.0, computed - per_row * rows),
        hidden=min(1.0, max(0.0, hidden)),
    )


class _Probe:
    """Random rows of the sizes of training, and the operations that are timed."""

    def __init__(self, layer: ClusteredMoE, tokens: int) -> None:
        self.layer, self.tokens, self.ranks = layer, tokens, layer.stage_one.group.size
        least = max(PART, self.ranks, len(layer.clusters))
        self.rows = max(least, min(tokens, MOST_ROWS) // least * least)
        weight_ED = layer.router.weight_ED
        draw = torch.Generator().manual_seed(0)
        self.x_RD = torch.randn(self.rows, weight_ED.shape[1], generator=draw).to(weight_ED.device, weight_ED.dtype)
        self.packed_RB = layer.stage_one.hidden_format.pack(self.x_RD)

    def exchange(self, rows: int) -> PendingAllToAll:
        """Start an all-to-all of `rows` rows, equally many to each rank."""
        split, ledger = [rows // self.ranks] * self.ranks, self.layer.context.ledger
        recording, ledger.recording = ledger.recording, False
        pending = self.layer.stage_one.launch(
            self.packed_RB[: sum(split)], split, split, Payload.HIDDEN, Direction.FORWARD
        )
        ledger.recording = recording
        return pending

    def compute(self, rows: int) -> None:
        """Run the forward pass of all local clusters, which divide the rows evenly."""
        context = self.layer.context
        counting, context.balance.counting = context.balance.counting, False
        recording, context.ledger.recording = context.ledger.recording, False
        with torch.no_grad():
            experts = self.layer.local_experts(self.tokens)
            for cluster, x_RD in enumerate(self.x_RD[:rows].chunk(len(self.layer.clusters))):
                experts.run_cluster(cluster, x_RD)
        context.balance.counting, context.ledger.recording = counting, recording

    def both(self, rows: int) -> None:
        """Overlap an all-to-all with a forward pass."""
        pending = self.exchange(rows)
        self.compute(rows)
        pending.wait()


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes after a barrier."""
    dist.barrier()
    started = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started
