"""A converted model under transformers.Trainer: on two ranks as on one, and saved for from_pretrained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_dist import MoEConfig, convert
from moe_dist.errors import ConfigError
from tests.distributed.drop_in import losses_of_example
from tests.distributed.ranks import run_ranks

transformers = pytest.importorskip("transformers", reason="needs moe-dist[models]")
pytestmark = pytest.mark.timeout(300)

MOE = MoEConfig(experts=8, clusters=2, rank=2, top_k=2, wire_dtype="float32", backend="masked", balance_rate=0.1)
TOKENS_BS = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(1))


def _model(mesh: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return convert(transformers.LlamaForCausalLM(config), MOE, mesh=mesh)


def _trained(model: Any, folder: str, ranks: int, max_grad_norm: float = 0.0) -> list[float]:
    from moe_dist.integrations.huggingface.trainer import ClusteredMoECallback

    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=len(TOKENS_BS) // ranks, num_train_epochs=4, logging_steps=1,
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=max_grad_norm, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TOKENS_BS]
    callback = ClusteredMoECallback(max_grad_norm=0.5)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _on_ranks(folder: str) -> tuple[list[list[float]], str, list[float]]:
    from moe_dist.integrations.huggingface.save_converted import save_converted

    losses = []
    for number, dims in enumerate([(2, 1), (1, 2)]):
        model = _model(init_device_mesh("cpu", dims, mesh_dim_names=("dp", "ep")))
        losses.append(_trained(model, folder, 2))
        save_converted(model, f"{folder}/saved-{number}")
    with pytest.raises(ConfigError) as caught:
        _trained(model, folder, 2, max_grad_norm=1.0)
    return losses, str(caught.value), losses_of_example("trainer_training.py")


@torch.no_grad()
def test_two_ranks_train_and_save_what_one_does(tmp_path: Path) -> None:
    from moe_dist.integrations.huggingface.registered import register
    from moe_dist.integrations.huggingface.save_converted import save_converted

    with torch.enable_grad():
        model = _model(None)
        expected = _trained(model, str(tmp_path), 1)
    assert expected[-1] < expected[0] - 0.1
    logits = model(TOKENS_BS).logits
    save_converted(model, tmp_path / "saved-alone")
    for losses, refusal, example in run_ranks(_on_ranks, 2, str(tmp_path), timeout=240):
        for found in losses:
            assert found == pytest.approx(expected, rel=1e-4)
        assert refusal.startswith("max_grad_norm=1.0 clips before experts are averaged: set it to 0")
        assert example[-1] < example[0] - 0.3, "the example learns"
    register()
    for name in ("alone", 0, 1):
        folder = tmp_path / f"saved-{name}"
        assert len(list(folder.glob("*.safetensors"))) == (2 if name == 1 else 1)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(again(TOKENS_BS).logits, logits, rtol=1e-4, atol=1e-4)
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match=r"has no clustered layers: call moe_dist\.convert first"):
        save_converted(torch.nn.Linear(2, 2), tmp_path / "none")
