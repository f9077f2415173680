"""Hardware models: compute and memory of a device, and bandwidth of its links.

Figures are the vendors' for one direction; `matmul_share` and `link_share` are the parts that real code reaches.
"""

import math
from dataclasses import dataclass

from moe_dist.config.device_peaks import PEAK_FLOPS
from moe_dist.errors import ConfigError

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One GPU and its own links.

    Attributes:
        flops: dense 16-bit matrix FLOP/s.
        memory: capacity in bytes.
        memory_bandwidth, node_bandwidth, network_bandwidth, host_bandwidth: bytes/s of its memory, to other devices of
            its node, to other nodes, to the host's memory.
        matmul_share: part of `flops` that large matrix products reach.
        link_share: part of a link's rate that an all-to-all reaches.
        reserved: bytes of libraries and of the allocator's fragmentation.
        expert_share: part of `flops` that the experts' products reach; None: as much as others.
        stack_bandwidth: bytes/s that its processor can pass to sockets; None: links need no processor.
        step_overhead: seconds of a step without work: starting operations, small collectives.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    matmul_share: float = 0.5
    link_share: float = 0.8
    reserved: float = 4 * GIGA
    expert_share: float | None = None
    stack_bandwidth: float | None = None
    step_overhead: float = 0.0


DEVICES = {
    device.name: device
    for device in (
        Device("v100", PEAK_FLOPS["v100"], 32 * GIGA, 0.9 * TERA, 150 * GIGA, 12.5 * GIGA, 12 * GIGA),
        Device("a100", PEAK_FLOPS["a100"], 80 * GIGA, 2.0 * TERA, 300 * GIGA, 25 * GIGA, 25 * GIGA),
        Device("h100", PEAK_FLOPS["h100"], 80 * GIGA, 3.35 * TERA, 450 * GIGA, 50 * GIGA, 50 * GIGA),
        Device("h200", PEAK_FLOPS["h200"], 141 * GIGA, 4.8 * TERA, 450 * GIGA, 50 * GIGA, 50 * GIGA),
        Device("b200", PEAK_FLOPS["b200"], 180 * GIGA, 8.0 * TERA, 900 * GIGA, 50 * GIGA, 50 * GIGA),
        Device("mi300x", PEAK_FLOPS["mi300x"], 192 * GIGA, 5.3 * TERA, 448 * GIGA, 50 * GIGA, 50 * GIGA),
    )
}


def device_named(name: str) -> Device:
    """Return a known device by name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name.lower() not in DEVICES:
        raise ConfigError(f"--gpu {name!r} is unknown: use one of {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


@dataclass(frozen=True)
class Fabric:
    """Nodes and the network between them.

    Attributes:
        rails: network interfaces of a node, each of a device's `network_bandwidth`, shared by its devices.
        pod_nodes: nodes below one leaf switch; traffic between pods crosses the spine.
        oversubscription: bandwidth of a leaf's downlinks over that of its uplinks; 1: none.
        node_latency, network_latency: least seconds of one exchange, inside a node and between nodes.
        sharing: devices that take turns on one processor: 1 on GPUs, more if ranks outnumber a machine's cores.
    """

    device: Device
    nodes: int
    devices_per_node: int
    rails: int
    pod_nodes: int
    oversubscription: float = 1.0
    node_latency: float = 10e-6
    network_latency: float = 25e-6
    sharing: float = 1.0

    @property
    def ranks(self) -> int:
        """Ranks of all nodes, one per device."""
        return self.nodes * self.devices_per_node

    @property
    def rail_bandwidth(self) -> float:
        """Return the bytes/s of one device between nodes while all send."""
        share = min(1.0, self.rails / self.devices_per_node)
        return self.device.network_bandwidth * share * self.device.link_share

    @property
    def node_bandwidth(self) -> float:
        """Return the bytes/s of one device to the others of its node."""
        return self.device.node_bandwidth * self.device.link_share

    @property
    def compute_rate(self) -> float:
        """Return the FLOP/s of a device in large matrix products."""
        return self.device.flops * self.device.matmul_share / self.sharing

    @property
    def expert_rate(self) -> float:
        """Return the FLOP/s of a device in experts while others wait for it; if all compute, they share (`sharing`)."""
        return self.device.flops * (self.device.expert_share or self.device.matmul_share)

    @property
    def stack_bandwidth(self) -> float:
        """Return the bytes/s that a device's processor moves while all do."""
        return (self.device.stack_bandwidth or math.inf) / self.sharing
