"""Time of an all-to-all from bytes between ranks: the busiest device inside nodes, the busiest interface, the spine.

Where processors move the data (`Device.stack_bandwidth`), all of it takes their time, whatever the link.

Shapes: D replicas of the expert-parallel group, C of them at a time, P ranks of a group.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moe_dist.simulator.hardware import Fabric

Floats = npt.NDArray[np.float64]
MOST_ENTRIES = 4_000_000


def exchange_seconds(
    mean_PP: Floats, grain: float, replicas: int, fabric: Fabric, exchanges: int, draw: np.random.Generator
) -> Floats:
    """Return seconds_D of one exchange pattern for every replica of the group.

    Every pair of ranks carries its mean and the chance variation of as many independent grains (variance = mean, in
    grains); all replicas send at once, so that they share the spine.

    Args:
        mean_PP: expected bytes from each rank to each.
        grain: bytes that are sent or not as a whole: one row's, both ways.
        exchanges: number of collectives, each of which costs a latency.
    """
    ranks = len(mean_PP)
    deviation_PP = np.sqrt(grain * mean_PP)
    busiest, leaving, arriving = [], [], []
    crosses = False
    for first, count in _chunks(replicas, ranks * ranks):
        place_CP = (np.arange(first, first + count)[:, None] * ranks) + np.arange(ranks)
        bytes_CPP = mean_PP + deviation_PP * draw.standard_normal((count, ranks, ranks), dtype=np.float32)
        bytes_CPP = np.maximum(bytes_CPP, 0)
        node_CP = place_CP // fabric.devices_per_node
        outside_CPP = bytes_CPP * (node_CP[:, :, None] != node_CP[:, None, :])
        inside_CP = _busier(bytes_CPP - outside_CPP) / fabric.node_bandwidth
        between_CP = _busier(outside_CPP) / fabric.rail_bandwidth
        moved_CP = _busier(bytes_CPP) / fabric.stack_bandwidth
        busiest.append(np.maximum(np.maximum(inside_CP, between_CP), moved_CP).max(axis=1))
        crosses = crosses or bool(between_CP.any())
        pod_CP = node_CP // fabric.pod_nodes
        spine_CPP = outside_CPP * (pod_CP[:, :, None] != pod_CP[:, None, :])
        leaving.append(spine_CPP.sum(axis=2).ravel())
        arriving.append(spine_CPP.sum(axis=1).ravel())
    spine = max(_spine_seconds(np.concatenate(part), fabric) for part in (leaving, arriving))
    latency = fabric.network_latency if crosses else fabric.node_latency
    seconds_D: Floats = np.maximum(np.concatenate(busiest), spine) + exchanges * latency * bool(mean_PP.any())
    return seconds_D


def _chunks(replicas: int, entries: int) -> Iterator[tuple[int, int]]:
    size = max(1, MOST_ENTRIES // entries)
    for first in range(0, replicas, size):
        yield first, min(size, replicas - first)


def _busier(bytes_CPP: Floats) -> Floats:
    """Return the larger of the bytes that each rank sends and receives."""
    busier_CP: Floats = np.maximum(bytes_CPP.sum(axis=2), bytes_CPP.sum(axis=1))
    return busier_CP


def _spine_seconds(bytes_R: Floats, fabric: Fabric) -> float:
    """Return the load of the busiest pod's uplinks, `oversubscription` times narrower than its devices' interfaces."""
    pod_R = np.arange(len(bytes_R)) // (fabric.devices_per_node * fabric.pod_nodes)
    per_pod = np.bincount(pod_R, weights=bytes_R)
    uplink = fabric.rail_bandwidth * fabric.devices_per_node * fabric.pod_nodes / fabric.oversubscription
    return float(per_pod.max() / uplink)


def reduce_seconds(bytes_held: float, sharing: int, on_node: int, fabric: Fabric) -> float:
    """Return seconds of one ring pass (reduce-scatter, all-gather) of n = `sharing` ranks: (n-1)/n of `bytes_held`.

    Args:
        on_node: ranks of the ring that are neighbors on one node, whose interfaces they share.
    """
    if sharing == 1:
        return 0.0
    rate = min(fabric.node_bandwidth, fabric.stack_bandwidth)
    if sharing > on_node:
        rate = min(rate, fabric.rail_bandwidth * on_node)
    return (sharing - 1) / sharing * bytes_held / rate
