"""A run that starts from the weights of another: the same validation loss on any ranks, an optimizer of its own."""

import json
from pathlib import Path

import pytest
import torch

from moe_dist import load_model, load_tokenizer
from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import load_config
from moe_dist.launch.preflight_weights import weight_problems
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE

pytestmark = pytest.mark.timeout(300)


def _train(folder: Path, *words: str) -> None:
    own = [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "tensorboard=false", "train.eval_every=0"]
    train(load_config(SMOKE, [*own, "train.warmup_steps=0", "moe.wire_dtype=float32", *words]))


def _train_and_load(folder: Path, *words: str) -> int:
    """Train, and return the parameters of another run's model, which needs nothing but its folder."""
    _train(folder, *words)
    model, tokenizer = load_model(folder / "runs" / "first"), load_tokenizer(folder / "runs" / "first")
    text = "def main() -> None:"
    ids = tokenizer.encode(text)
    with torch.no_grad():
        logits_BSV, losses_BS = model.logits_and_losses(torch.tensor([ids]))
    assert tokenizer.decode(ids) == text
    chosen_S = logits_BSV[0].float().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(losses_BS[0].float(), -chosen_S, rtol=2e-2, atol=2e-2)
    return sum(parameter.numel() for parameter in model.parameters())


def _loss(folder: Path, name: str) -> float:
    loss: float = json.loads((folder / "runs" / name / "summary.json").read_text())["validation"]["loss"]
    return loss


STILL = ["train.steps=1", "moe.balance_rate=0", "optimizer.learning_rate=1e-12"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_starts_from_the_weights_of_a_run(tmp_path: Path, precision: str) -> None:
    words = [f"train.precision={precision}", "moe.kind=clustered"]
    run_ranks(_train, 2, tmp_path, "name=first", "train.steps=4", *words)
    init = f"checkpoint.init={tmp_path}/runs/first"
    (parameters,) = run_ranks(_train_and_load, 1, tmp_path, "name=second", init, *STILL, *words)
    run_ranks(_train, 1, tmp_path, "name=other", *STILL, *words)
    expected, found, random = (_loss(tmp_path, name) for name in ("first", "second", "other"))
    assert found == pytest.approx(expected, rel=1e-5 if precision == "float32" else 1e-3)
    assert random > expected + 0.01
    (tmp_path / "other.txt").write_text("\n\n".join(f"number {at} = {at * at}" for at in range(2000)))
    text = ["corpus.kind=text", f"corpus.paths={tmp_path}/other.txt", *STILL, *words]
    run_ranks(_train, 1, tmp_path, "name=tuned", init, *text)
    run_ranks(_train, 1, tmp_path, "name=fresh", f"tokenizer.path={tmp_path}/runs/first", *text)
    tokenizers = [(tmp_path / "runs" / name / "tokenizer.model").read_bytes() for name in ("first", "tuned", "fresh")]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]
    assert _loss(tmp_path, "tuned") < _loss(tmp_path, "fresh") - 0.01
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    assert parameters == summary["parameters"]["total"]  # laid out over two ranks when it was trained


def test_other_models_and_files_are_refused(tmp_path: Path) -> None:
    run_ranks(_train, 1, tmp_path, "name=first", "train.steps=1")
    run = tmp_path / "runs" / "first"
    export_weights(find_weights(run), tmp_path / "first.safetensors")
    for words, line in {
        ("model.hidden_size=64",): "model.hidden_size is 32 there, 64 here; give the values that are there",
        ("moe.kind=dense", "moe.rank=1"): "moe.kind is clustered there, dense here, moe.rank is 2 there, 1 here; give",
        ("moe.rank=1",): "moe.rank is 2 there, 1 here; give the values that are there",
    }.items():
        (problem,) = weight_problems(load_config(SMOKE, [f"checkpoint.init={run}", *words]))
        assert problem.startswith(f"checkpoint.init={run} holds another model: {line}")
    assert not list(weight_problems(load_config(SMOKE, [f"checkpoint.init={run}", "model.sequence_length=16"])))
    for init, more, match in (
        (run, "model.hidden_size=64", "the model needs"),
        (tmp_path / "first.safetensors", "seed=1", "is an exported file"),
        (tmp_path / "none", "seed=1", "does not exist"),
        (run, "tokenizer.vocab_size=480", "was trained with another tokenizer .*: remove the keys tokenizer"),
    ):
        with pytest.raises(AssertionError, match=f"CheckpointError: .*{match}"):
            run_ranks(_train, 1, tmp_path, f"checkpoint.init={init}", "name=second", *STILL, more)
