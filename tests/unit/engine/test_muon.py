"""Update of one matrix against torch's Muon, choice of matrices, and refusals."""

import pytest
import torch
from torch import nn

from moe_dist.config import OptimizerConfig, load_config
from moe_dist.engine.muon import is_matrix, muon_step
from moe_dist.errors import ConfigError


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_updates_are_torch_s_to_the_bit(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = nn.Parameter(torch.randn(shape, generator=generator))
    ours, momentum = theirs.detach().clone(), torch.zeros(shape)
    optimizer = torch.optim.Muon([theirs], 0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        theirs.grad = gradient.clone()
        optimizer.step()
        muon_step(ours, gradient, momentum, 0.01, 0.1, OptimizerConfig(muon_momentum=0.9))
    assert torch.equal(ours, theirs)
    assert torch.equal(momentum, optimizer.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("gpt.decoder.layers.0.self_attention.linear_qkv.weight", (6, 2), True),
        ("gpt.decoder.layers.0.self_attention.q_layernorm.weight", (2,), False),
        ("gpt.decoder.layers.0.mlp.inner.clusters.0.base.w_in_DH", (2, 4), True),
        ("gpt.decoder.layers.0.mlp.inner.clusters.0.base.in_p_DR", (2, 1), False),
        ("gpt.decoder.layers.0.mlp.inner.shared_base.w_out_FD", (2, 2), True),
        ("gpt.decoder.layers.0.mlp.inner.clusters.0.residuals.in_u_NDR", (3, 2, 2), False),
        ("gpt.decoder.layers.0.mlp.inner.clusters.0.residuals.hidden_gate_NF", (3, 2), False),
        ("gpt.decoder.layers.0.mlp.inner.router.weight_ED", (3, 2), False),
        ("gpt.decoder.layers.0.mlp.inner.experts.w_in.3", (2, 4), True),
        ("gpt.decoder.layers.0.mlp.inner.w_out_FD", (2, 2), True),
        ("gpt.embedding.word_embeddings.weight", (9, 2), False),
        ("gpt.output_layer.weight", (9, 2), False),
    ],
)
def test_matrices_of_attention_and_feed_forward_layers_alone(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_matrix(name, nn.Parameter(torch.zeros(shape))) is expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world.tensor=2"], "world.tensor=2 does not work with optimizer.kind=muon, which updates whole matrices"),
        (["world.shard=2", "world.shard_mode=slice"], "world.shard_mode=slice .* whole matrices: set it to replicate"),
        (["memory.offload=true"], "memory.offload=true does not work with optimizer.kind=muon: set it to false"),
        (["precision.residuals=packed"], "precision.residuals=packed .*: set it to none, post or qat"),
        (["optimizer.trainable=residuals"], "optimizer.trainable=residuals .*: set it to all"),
    ],
)
def test_what_divides_matrices_or_has_an_optimizer_of_its_own_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["optimizer.kind=muon", *words])
