"""One rank of four: a clustered layer forward and backward, its ledger's bytes beside those of the node's interface.

Writes FOLDER/rank-R.json: bytes that the ledger says went to other nodes, and (first rank of a node) the interface's.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.config import ModelConfig, MoEConfig, WorldShape
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.links import LinkKind, Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.load_balancing import BalanceState

HIDDEN, TOKENS, ROUNDS = 256, 2048, 3
MOE = MoEConfig(experts=16, clusters=4, top_clusters=2, top_k=2, expert_hidden=32, rank=2)


def interface() -> tuple[int, int]:
    """Bytes and packets that eth0 has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        device, _, figures = line.partition(":")
        if device.strip() == "eth0":
            return int(figures.split()[8]), int(figures.split()[9])
    raise AssertionError("no eth0")


def settled_interface() -> tuple[int, int]:
    """The same while no rank sends: acknowledgements of the barrier come late, and others of the node may be ahead."""
    dist.barrier()
    time.sleep(0.5)
    seen = interface()
    dist.barrier()
    return seen


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    shape, device = WorldShape(1, 4, 1), torch.device("cpu")
    mesh = Mesh.create(shape, timedelta(seconds=60))
    ledger = TrafficLedger(Links.discover(device))
    placement = ExpertPlacement.contiguous(MOE.experts, MOE.clusters, shape)
    context = LayerContext(mesh, [placement], BalanceState.create(1, MOE, device), ledger, 0)
    layer = ClusteredMoE.in_model(0, ModelConfig(hidden_size=HIDDEN, heads=2, layers=1), MOE, context, 1.0)
    torch.manual_seed(mesh.rank)
    x_TD = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    layer(x_TD).sum().backward()  # connects
    ledger.clear()
    before = settled_interface()
    for _ in range(ROUNDS):
        layer(x_TD).sum().backward()
    after = settled_interface()
    found = {
        "node": os.uname().nodename,
        "ledger": ledger.total(LinkKind.INTER_NODE).bytes,
        "bytes": after[0] - before[0],
        "packets": after[1] - before[1],
    }
    (Path(sys.argv[1]) / f"rank-{mesh.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
