"""Clustered layers inside a model of transformers: the same function, which trains and generates."""

from pathlib import Path

import pytest
import torch

from moe_dist import MoEConfig, convert, update_load_balance
from moe_dist.errors import ConfigError

pytest.importorskip("transformers", reason="needs moe-dist[models]")

from tests.unit.integrations.published import TOKENS_BS, published, relative, their_logits

MOE = MoEConfig(experts=8, clusters=2, rank=2, top_k=2, expert_hidden=7, backend="masked")


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_converted_model_is_the_same_function_and_trains(tmp_path: Path, name: str) -> None:
    model = published(tmp_path, name)
    before, cached = their_logits(model), model.generate(TOKENS_BS[:, :9], max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    convert(model, MOE)
    assert relative(their_logits(model), before) < 1e-5
    assert torch.equal(model.generate(TOKENS_BS[:, :9], max_new_tokens=5, do_sample=False), cached)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(TOKENS_BS, labels=TOKENS_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_load_balance(model)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    experts = model.model.layers[0].mlp.layer.clusters[0].residuals.in_v_NRH  # type: ignore[union-attr, index]
    assert not torch.equal(experts[0], experts[1]), "experts part"


def test_other_models_and_configurations_are_refused(tmp_path: Path) -> None:
    model = published(tmp_path, "Llama")
    with pytest.raises(ConfigError, match="would compute something else"):
        convert(model, MOE.model_copy(update={"gate_scale": 2.0}))
    with pytest.raises(ConfigError, match="Linear has no dense SwiGLU layers"):
        convert(torch.nn.Linear(2, 2), MOE)
    convert(model, MOE)
    with pytest.raises(ConfigError, match="has no dense SwiGLU layers"):
        convert(model, MOE)
