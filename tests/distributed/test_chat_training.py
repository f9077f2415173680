"""Fine-tuning on chats: context has no loss, and each answer's token the same weight on any ranks."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_dist.config import WorldConfig, load_config
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.model.language_model import LanguageModel
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE
from tests.unit.data.test_chats import chat_file, chat_folder

pytest.importorskip("transformers", reason="needs moe-dist[models]")
pytestmark = pytest.mark.timeout(300)


def _model(*words: str) -> LanguageModel:
    init_distributed(WorldConfig(backend="gloo", timeout_seconds=60))
    return LanguageModel(load_config(SMOKE, list(words)), 320, Mesh.alone(), Links.alone())


def _losses(kind: str) -> list[Tensor]:
    model = _model(f"moe.kind={kind}")
    plain_BS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    marked_BS = plain_BS.clone()
    marked_BS[:, 2:6] = ~marked_BS[:, 2:6]
    model.target_share = 0.5
    with model.evaluating():
        return [model.token_losses(plain_BS), model.token_losses(marked_BS), model(marked_BS)]


@pytest.mark.parametrize("kind", ["clustered", "dense"])
def test_context_has_no_loss_and_changes_nothing_else(kind: str) -> None:
    ((plain_BS, marked_BS, mean),) = run_ranks(_losses, 1, kind)
    expected_BS = plain_BS.clone()
    expected_BS[:, 1:5] = 0
    assert torch.equal(marked_BS, expected_BS)
    torch.testing.assert_close(mean, expected_BS.sum() / (16 * 0.5))


def _conversations() -> list[Tensor]:
    """Losses of two conversations alone, and of both in one sequence."""
    model, end, message = _model("corpus.document_mask=true", "train.precision=float32"), 1, 1 << 30 | 1
    model.end_of_document = end
    first = [~5, ~6, ~message, 7, message, ~8, ~message, 9, 3, message, ~end]  # two questions and answers
    second = [~4, ~4, ~message, 7, 7, message, ~end]
    with model.evaluating():
        return [model.token_losses(torch.tensor([ids])) for ids in (first, second, first + second)]


def test_masks_part_conversations_and_not_their_messages() -> None:
    ((first_BS, second_BS, both_BS),) = run_ranks(_conversations, 1)
    torch.testing.assert_close(both_BS[:, :10], first_BS)
    torch.testing.assert_close(both_BS[:, 11:], second_BS)
    targets = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    assert torch.equal(first_BS[0] > 0, targets)


def _train(folder: Path, *words: str) -> None:
    own = [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "tensorboard=false", "train.eval_every=0"]
    chat = ["corpus.kind=chat", f"corpus.paths=[{folder}/chats.jsonl]", "corpus.max_bytes=null"]
    tokenizer = ["tokenizer.kind=hf", f"tokenizer.path={folder}/hf", "tokenizer.vocab_size=320"]
    train(load_config(SMOKE, [*own, *chat, *tokenizer, "train.precision=float32", "moe.wire_dtype=float32", *words]))


def test_any_ranks_and_micro_batches_train_alike(tmp_path: Path) -> None:
    chat_folder(tmp_path / "hf")
    chats = [
        [{"role": "user", "content": "count " * (n % 7)}, {"role": "assistant", "content": f"{n} " * (1 + n % 5)}]
        for n in range(150)
    ]
    chat_file(tmp_path / "chats.jsonl", *chats)
    layouts: list[tuple[int, list[str]]] = [(1, []), (2, ["world.cluster=2"]), (1, ["train.micro_batch_size=1"])]
    found = []
    for number, (ranks, words) in enumerate(layouts):
        run_ranks(_train, ranks, tmp_path, f"name=run-{number}", "train.steps=6", *words)
        run = tmp_path / "runs" / f"run-{number}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
        found.append([line["train"]["loss"] for line in lines if "train" in line] + [summary["validation"]["loss"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)
