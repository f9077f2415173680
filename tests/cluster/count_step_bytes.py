"""One rank: training steps of layouts, predicted bytes to other nodes beside those of the node's interface.

Writes FOLDER/rank-R.json: for each case the bytes that the rank is predicted to send to other nodes, by purpose, and
the interface's bytes and packets.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch

from moe_dist.config import load_config, resolve_batch, resolve_world
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.model.language_model import LanguageModel
from tests.cluster.count_bytes import settled_interface

VOCABULARY, LENGTH, STEPS = 1024, 128, 2
SIZES = [
    "model.hidden_size=128", "model.heads=4", "model.layers=4", f"model.sequence_length={LENGTH}", "moe.experts=8",
    "moe.clusters=4", "moe.expert_hidden=128", "train.global_batch_size=16", "train.micro_batch_size=4",
    "train.precision=float32", "moe.backend=sorted", "world.backend=gloo",
]  # fmt: skip


def measured(words: list[str], ranks: int) -> dict[str, object]:
    """Predicted bytes to other nodes by purpose, and bytes and packets that the interface has sent meanwhile."""
    config = load_config(None, [*SIZES, *words])
    process = init_distributed(config.world)
    batch, mesh = resolve_batch(config, ranks), Mesh.create(resolve_world(config, ranks))
    ledger = TrafficLedger(Links.discover(process.device))
    model = LanguageModel(config, VOCABULARY, mesh, ledger.links, batch.accumulation, ledger)
    engine = DeepSpeedEngine(model, config, batch, process)
    draw = torch.Generator().manual_seed(mesh.rank // mesh.shape.sequence_parts)
    sequences = torch.randint(VOCABULARY, (batch.micro * batch.accumulation, LENGTH + 1), generator=draw)
    engine.update(engine.forward_backward(sequences), 1e-3)  # connects
    ledger.clear()
    before = settled_interface()
    for _ in range(STEPS):
        engine.update(engine.forward_backward(sequences), 1e-3)
    after = settled_interface()
    node_of_rank = ledger.links.node_of_rank
    elsewhere = {rank for rank in range(ranks) if node_of_rank[rank] != node_of_rank[process.rank]}
    parts = engine.collective_bytes()
    sent = {name: STEPS * sum(to[rank] for rank in elsewhere & to.keys()) for name, to in parts.items()}
    dispatch = Counter[int]()
    for key, volume in ledger.sent.items():
        dispatch[key.peer] += volume.bytes
    sent["all-to-all"] = sum(dispatch[rank] for rank in elsewhere)
    return {"sent": sent, "bytes": after[0] - before[0], "packets": after[1] - before[1]}


def main() -> None:
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    ranks = int(os.environ["WORLD_SIZE"])
    found = [measured(words, ranks) for words in cases]
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps({"node": os.uname().nodename, "found": found}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
