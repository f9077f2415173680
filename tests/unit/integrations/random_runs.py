"""Runs of every kind of layer with random weights, selection biases and members of clusters."""

from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint.manifest import DataRecord, Manifest
from moe_dist.checkpoint.model_state import weights_of
from moe_dist.checkpoint.placement_record import placement_to_record
from moe_dist.checkpoint.save_and_load import write_checkpoint
from moe_dist.checkpoint.stateful import tensors_of
from moe_dist.config import WorldConfig, dump_config, load_config
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.model.language_model import LanguageModel
from tests.unit.data.samples import hf_tokenizer
from tests.unit.integrations.published import TOKENS_BS

SMALL = [
    "model.layers=2", "model.hidden_size=32", "model.heads=4", "model.kv_heads=2", "model.sequence_length=64",
    "moe.experts=8", "moe.clusters=2", "moe.top_k=2", "moe.expert_hidden=24", "moe.rank=3", "moe.wire_dtype=float32",
    "moe.backend=masked", "train.precision=float32",
    "tokenizer.kind=hf", "tokenizer.path=.", "tokenizer.vocab_size=320",
]  # fmt: skip

LATENT = [
    "model.kv_heads=null",
    "model.latent={query_rank: 10, kv_rank: 12, plain_dim: 6, rotary_dim: 4, value_dim: 5}",
    "model.rope_scaling={kind: yarn, factor: 4, original_length: 16, mscale: 0.7, mscale_all_dim: 0.5}",
]
"""Words of latent attention."""


def random_runs(cases: dict[Path, list[str]]) -> list[Tensor]:
    """Write a run for each case; return the logits of its model. In a process of its own."""
    process = init_distributed(WorldConfig(backend="gloo", timeout_seconds=60))
    found = []
    for number, (run, words) in enumerate(cases.items()):
        config = load_config(None, [*SMALL, *words])
        model = LanguageModel(config, 320, Mesh.alone(), Links.alone()).to_device(process.device)
        draw = torch.Generator().manual_seed(number)
        context = model.context
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                deviation = 0.1 if tensor.ndim == 1 else tensor.shape[-2] ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * deviation + ("norm" in name))
            kind, biased = config.moe.layer_kind, config.moe.balance == "bias"
            for bias, used in (
                (context.balance.expert_bias_LE, kind.routed),
                (context.balance.cluster_bias_LG, kind.clustered),
            ):
                bias.copy_(torch.randn(bias.shape, generator=draw) * (used and biased))
        for layer, placement in enumerate(context.placements):
            order = torch.randperm(config.moe.experts, generator=draw).view(placement.clusters, -1).tolist()
            context.placements[layer] = placement.with_members(tuple(map(tuple, order)))
        for clustered in model.clustered_layers():
            clustered.follow_placement()
        run.mkdir()
        (run / "config.yaml").write_text(dump_config(config))
        hf_tokenizer(run)
        manifest = Manifest(
            kind="weights", step=3, ranks=1, config=config.model_dump(mode="json"),
            data=DataRecord(train_checksum=0, validation_checksum=0, vocab_size=320, next_step=3),
            placements=[placement_to_record(placement) for placement in context.placements],
        )  # fmt: skip
        state = {**weights_of(model), **tensors_of({"balance": context.balance}, 0, 1)}
        write_checkpoint(run / "final", manifest, state, 0)
        position_BS = torch.arange(TOKENS_BS.shape[1]).expand_as(TOKENS_BS)
        with model.evaluating():
            found.append(model.gpt(TOKENS_BS, position_BS, None))
    return found
