"""Predicted bytes of a step against all collectives that the ranks issue, seen by torch's dispatcher."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from moe_dist.benchmarks.attach.inside.moe_dist_attach import CollectiveCounter, count_with
from moe_dist.config import load_config, resolve_batch, resolve_world
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.model.language_model import LanguageModel
from tests.distributed.ranks import run_ranks

VOCABULARY, LENGTH = 512, 64
SMALL = [
    "model.hidden_size=64", "model.heads=4", "model.layers=4", f"model.sequence_length={LENGTH}", "moe.experts=8",
    "moe.clusters=4", "moe.expert_hidden=64", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.precision=float32", "moe.backend=sorted",
]  # fmt: skip
CASES = [
    ["world.tensor=2", "world.pipeline=2", "world.zero_stage=0", "model.tie_embeddings=false", "model.kv_heads=2"],
    ["world.context=2", "model.kv_heads=1", "model.activation_checkpointing=true", "world.cluster=2"],
    ["world.pipeline=2", "world.virtual_pipeline=2", "world.zero_stage=2", "train.micro_batch_size=1"],
    ["world.tensor=2", "world.context=2", "model.activation_checkpointing=true", "world.cluster=4"],
    ["world.zero_stage=2", "train.micro_batch_size=1", "world.cluster=2"],
    ["optimizer.kind=muon", "world.cluster=2", "world.zero_stage=0"],
    ["optimizer.kind=muon", "world.cluster=2", "world.zero_stage=2", "world.pipeline=2"],
    ["memory.offload=true", "memory.device_budget_ratio=0.2", "world.cluster=2", "train.micro_batch_size=1"],
]
Outcome = tuple[dict[int, float], dict[str, dict[int, float]]]
SMALL_PARTS = 4096
"""Most bytes of what is left out: norms, statistics, sums of the cross-entropy."""


def _sent(cases: list[list[str]], folder: str) -> list[Outcome]:
    """For each case, bytes to each rank as counted, and by purpose as predicted or kept in the ledger."""
    counter = CollectiveCounter(Path(folder))
    count_with(counter)
    return [_of_case(words, counter) for words in cases]


def _of_case(words: list[str], counter: CollectiveCounter) -> Outcome:
    config = load_config(None, [*SMALL, *words])
    process = init_distributed(config.world)
    batch, mesh = resolve_batch(config, process.ranks), Mesh.create(resolve_world(config, process.ranks))
    ledger = TrafficLedger(Links.discover(process.device))
    clusters = config.moe.clusters // mesh.shape.cluster
    memory = ExpertMemory(config, clusters, process.rank, process.device) if config.memory.offload else None
    model = LanguageModel(config, VOCABULARY, mesh, ledger.links, batch.accumulation, ledger, memory)
    engine = DeepSpeedEngine(model, config, batch, process)
    counter.counts.clear()
    draw = torch.Generator().manual_seed(mesh.rank // mesh.shape.sequence_parts)
    sequences = torch.randint(VOCABULARY, (batch.micro * batch.accumulation, LENGTH + 1), generator=draw)
    engine.update(engine.forward_backward(sequences), 1e-3)
    counted = Counter[int]()
    for count in counter.counts.values():
        counted.update(count.to_rank)
    parts = engine.collective_bytes()
    if memory is not None:
        memory.close()
    dispatch = Counter[int]()
    for key, volume in ledger.sent.items():
        dispatch[key.peer] += volume.bytes
    return dict(counted), {**parts, "all-to-all": dict(dispatch)}


def test_every_rank_sends_to_each_other_what_is_predicted(tmp_path: Path) -> None:
    for rank, outcomes in enumerate(run_ranks(_sent, 4, CASES, str(tmp_path), timeout=170)):
        for words, (counted, parts) in zip(CASES, outcomes, strict=True):
            predicted = Counter[int]()
            for part in parts.values():
                predicted.update(part)
            for peer in sorted({*counted, *predicted}):
                assert counted.get(peer, 0) == pytest.approx(predicted[peer], rel=0.01, abs=SMALL_PARTS), (
                    f"{words}, from {rank} to {peer}: {parts}"
                )
