"""`moe-dist simulate`: one configuration under every routing strategy."""

from pathlib import Path

import numpy as np

from moe_dist.config import RunConfig, resolve_batch, resolve_world
from moe_dist.simulator.hardware import Fabric
from moe_dist.simulator.popularity import recorded, zipf
from moe_dist.simulator.step_time import Scenario, StepTime, step_time
from moe_dist.simulator.strategies import Strategy


def compare(
    config: RunConfig,
    fabric: Fabric,
    vocabulary: int,
    *,
    skew: float,
    trace: Path | None,
    most_nodes: int,
    recluster_every: int,
    resident: float,
    overlap: float,
) -> dict[str, StepTime]:
    """Predict steps of standard experts, flat and node-limited, and of clustered ones without and with optimizations.

    Standard and clustered experts have the same number, width and groups of ranks.

    Args:
        trace: run folder whose loads are used instead of `skew`.

    Raises:
        ConfigError: the layout does not fit the ranks or one of the two kinds, or the trace does not fit the experts.
    """
    experts = config.moe.experts
    popularity_LE = recorded(trace, experts) if trace else zipf(experts, skew, 2, np.random.default_rng(config.seed))
    clustered, standard = config.of_kind("clustered"), config.of_kind("standard")
    limited = {"most_nodes": most_nodes}
    cases = {
        "flat": (standard, Scenario(Strategy.FLAT, overlap=overlap)),
        "node-limited": (standard, Scenario(Strategy.NODE_LIMITED, overlap=overlap, **limited)),
        "two-stage": (clustered, Scenario(Strategy.TWO_STAGE, overlap=overlap)),
        "+ regrouped": (clustered, Scenario(Strategy.TWO_STAGE, recluster_every, overlap=overlap)),
        "+ offloaded": (clustered, Scenario(Strategy.TWO_STAGE, recluster_every, resident, overlap)),
    }
    batch = resolve_batch(config, fabric.ranks)
    shape = resolve_world(clustered, fabric.ranks)
    return {
        name: step_time(single, shape, batch, vocabulary, fabric, popularity_LE, scenario)
        for name, (single, scenario) in cases.items()
    }
