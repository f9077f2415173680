"""Runs on a blend of sources with packed documents: other ranks, and other weights from a checkpoint on."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.errors import CheckpointError
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.unit.data.samples import documents_of

CONFIG = """
tensorboard: false
model: {layers: 2, hidden_size: 32, heads: 2, sequence_length: 32}
moe: {kind: dense, expert_hidden: 32}
corpus:
  sources: {code: {max_bytes: 200000, weight: 3}, words: {paths: words.jsonl, max_epochs: 2.5}}
  document_mask: true
  packing: best_fit
tokenizer: {vocab_size: 400}
train: {steps: 6, global_batch_size: 8, precision: float32, warmup_steps: 2, eval_every: 3, eval_sequences: 8}
checkpoint: {every: 3, keep_last: 9}
"""
CHANGE = "corpus.schedule=[{step: 3, weights: {code: 1}}]"


def _words(folder: Path, name: str, *more: str) -> list[str]:
    paths = f"corpus.sources.words.paths={folder}/words.jsonl"
    return [
        "train.log_every=1",
        f"name={name}",
        f"runs_dir={folder}/runs",
        f"corpus.cache_dir={folder}/cache",
        paths,
        *more,
    ]


def _train(folder: Path, name: str, *more: str) -> None:
    train(load_config(folder / "blend.yaml", _words(folder, name, *more)))


def _refused(folder: Path, name: str, *more: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the checkpoint of step 3 has drawn .*\(code 18, words 6\).*step: 3"):
        _train(folder, name, *more)


def _lines(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train"] for line in lines if "train" in line}


@pytest.mark.slow
def test_a_blend_on_other_ranks_and_with_other_weights_from_a_checkpoint_on(tmp_path: Path) -> None:
    (tmp_path / "blend.yaml").write_text(CONFIG)
    (tmp_path / "words.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in documents_of(3, 80)))
    run_ranks(_train, 1, tmp_path, "plain")
    run_ranks(_train, 1, tmp_path, "changed", CHANGE)
    start = f"checkpoint.resume={tmp_path}/runs/plain/checkpoints/step-00000003"
    run_ranks(_train, 2, tmp_path, "resumed", CHANGE, start, "world.context=2")
    run_ranks(_train, 2, tmp_path, "staged", CHANGE, start, "world.pipeline=2")
    run_ranks(_refused, 1, tmp_path, "refused", start, "corpus.sources.code.weight=1")
    plain, changed, *others = (_lines(tmp_path, name) for name in ("plain", "changed", "resumed", "staged"))
    assert plain[3] == changed[3]
    assert plain[4]["loss"] != changed[4]["loss"]
    for resumed, step in product(others, (4, 5, 6)):
        assert resumed[step]["loss"] == pytest.approx(changed[step]["loss"], rel=1e-5)
        assert resumed[step]["sources"] == pytest.approx(changed[step]["sources"], rel=1e-5)
    summary = json.loads((tmp_path / "runs" / "resumed" / "summary.json").read_text())
    sources, validation = summary["data"]["sources"], summary["validation"]
    assert (sources["code"]["sequences"], sources["words"]["sequences"]) == (18 + 12, 6 + 12)
    losses = validation["curve"][-1]["sources"]
    assert validation["loss"] == pytest.approx((3 * losses["code"] + losses["words"]) / 4)
    assert 0 < sources["words"]["padding"] < 0.2
