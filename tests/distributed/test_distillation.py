"""Training against a teacher: the same on any ranks, live or stored; routers alone at first; refusals in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import load_config
from moe_dist.distillation import store
from moe_dist.distillation.spec import StoreSpec
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.training import trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE
from tests.unit.data.samples import documents_of

pytestmark = pytest.mark.timeout(300)
LIVE = ["distill.teacher={0}/runs/teacher", "distill.weight=0.7", "distill.temperature=2"]
ROUTERS = [*LIVE, "distill.router_steps=2", "train.final_lr_ratio=1"]
STORED = [*LIVE[1:], "distill.teacher={0}/stored"]
ALL_TOKENS = 512
BLEND = [
    "corpus.sources={{code: {{max_bytes: 80000, weight: 3}}, words: {{kind: text, paths: [{0}/words.jsonl]}}}}",
    "corpus.max_bytes=null",
]
BLENDED = [*BLEND, "distill.teacher={0}/runs/teacher-blend"]


def _words(folder: Path, name: str, words: list[str]) -> list[str]:
    own = [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "tensorboard=false", "train.eval_every=0"]
    small = ["corpus.max_bytes=100000", "train.steps=3", "train.warmup_steps=0", "moe.wire_dtype=float32"]
    return [*own, *small, f"name={name}", *(word.format(folder) for word in words)]


def _runs(folder: Path, runs: dict[str, list[str]], top_k: int | None = None) -> list[str]:
    """Train some runs in one process group, after storing the teacher's predictions; return what was refused."""
    trainer.shutdown = store.shutdown = lambda: None  # type: ignore[attr-defined]
    refused = []
    if top_k is not None:
        config = load_config(SMOKE, _words(folder, "unused", LIVE))
        store.store_logits(config, StoreSpec(str(folder / "stored"), top_k))
    for name, words in runs.items():
        try:
            trainer.train(load_config(SMOKE, _words(folder, name, words)))
        except MoeDistError as error:
            refused.append(str(error))
    return refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of standard experts, and what it predicts."""
    folder = tmp_path_factory.mktemp("distillation")
    standard = ["moe.kind=standard", "optimizer.learning_rate=0.02", "train.precision=float32"]
    still = [*LIVE, "optimizer.learning_rate=1e-12", "train.steps=1"]
    micro = [*LIVE, "train.micro_batch_size=4"]
    taught = {"live": LIVE, "routers": ROUTERS, "micro": micro, "still": still}
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents_of(0, 60)))
    blends = {"teacher-blend": [*standard, *BLEND], "blend": BLENDED}
    run_ranks(_runs, 1, folder, {"teacher": standard, "none": [], **taught, **blends})
    both = [*ROUTERS, "train.steps=2"]
    routers = {"routers-2": both, "routers-zero-2": [*both, "world.zero_stage=2"]}
    runs = {"live-2": LIVE, "context-2": [*LIVE, "world.context=2"], "blend-2": BLENDED, "stored-2": STORED, **routers}
    run_ranks(_runs, 2, folder, runs, ALL_TOKENS)
    return folder


def _summary(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / name / "summary.json").read_text())
    return found


def _figures(folder: Path, name: str) -> list[float]:
    """Losses and divergences of every step and of the comparisons with the teacher."""
    lines = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    steps = [line["train"] for line in lines if "train" in line]
    told = _summary(folder, name)["teacher"]
    figures = [step[key] for step in steps for key in ("loss", "teacher_divergence", "gradient_norm")]
    return figures + [told[when][key] for when in ("before", "after") for key in ("loss", "teacher_loss", "divergence")]


def test_ranks_micro_batches_and_stored_predictions_train_alike(folder: Path) -> None:
    expected = _figures(folder, "live")
    assert len(expected) == 3 * 3 + 6
    for name, tolerance in (
        ("micro", 1e-4),
        ("live-2", 1e-4),
        ("context-2", 1e-4),
        ("stored-2", 2e-3),
    ):  # stored in float16
        assert _figures(folder, name) == pytest.approx(expected, rel=tolerance), name


def test_a_blend_has_a_teacher_and_losses_of_each_source(folder: Path) -> None:
    assert _figures(folder, "blend-2") == pytest.approx(_figures(folder, "blend"), rel=1e-4)
    told, loss = _summary(folder, "blend")["teacher"]["after"], _summary(folder, "blend")["validation"]["loss"]
    assert told["loss"] == pytest.approx(loss, rel=1e-5)
    lines = map(json.loads, (folder / "runs" / "blend" / "metrics.jsonl").read_text().splitlines())
    assert all(set(line["train"]["sources"]) == {"code", "words"} for line in lines if "train" in line)


def test_the_teacher_pulls_and_its_loss_is_that_of_its_run(folder: Path) -> None:
    told = _summary(folder, "live")["teacher"]
    loss = _summary(folder, "teacher")["validation"]["loss"]
    assert [told[when]["teacher_loss"] for when in ("before", "after")] == pytest.approx([loss, loss], rel=1e-5)
    assert told["after"]["loss"] == pytest.approx(_summary(folder, "live")["validation"]["loss"], rel=1e-5)
    assert told["after"]["divergence"] < 0.9 * told["before"]["divergence"]
    assert "teacher" not in _summary(folder, "none")


def test_routers_alone_keep_all_other_bits(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = {}
    for name in ("still", "routers-2", "routers-zero-2", "routers"):
        export_weights(find_weights(folder / "runs" / name), folder / f"{name}.safetensors")
        weights[name] = load_file(folder / f"{name}.safetensors")

    def changed(name: str) -> set[str]:
        return {key for key, value in weights[name].items() if (value - weights["still"][key]).abs().max() > 1e-9}

    routers = {key for key in weights["still"] if ".router." in key}
    for name in ("routers-2", "routers-zero-2"):
        assert {key for key in changed(name) if "balance" not in key} == routers
    assert len(changed("routers")) > len(weights["still"]) / 2, "then all learn"
    assert _figures(folder, "routers")[:6] == pytest.approx(_figures(folder, "routers-2")[:6], rel=1e-4)


def test_what_does_not_fit_is_refused_in_one_line(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    cases = {
        r"distill.teacher=\S+none does not exist|none does not exist": ["distill.teacher={0}/none"],
        r"is a Hugging Face folder: give the run that `moe-dist import": ["distill.teacher={0}/hf"],
        r"has a vocabulary of 512 tokens, but this run's has 600": [*LIVE, "tokenizer.vocab_size=600"],
        r"has another tokenizer than this run": [*LIVE, "tokenizer.kind=unigram"],
        r"was stored for another sequence_length \(32, this run has 16\)": [*STORED, "model.sequence_length=16"],
        r"was stored for another temperature \(2.0, this run has 1.0\)": [*STORED, "distill.temperature=1"],
        r"stored predictions do not work with corpus.kind=blend: give one source, or train with": [*STORED, *BLEND],
        r"was stored for another train_checksum": [*STORED, "corpus.max_bytes=90000", "tokenizer.train_bytes=50000"],
    }
    (refused,) = run_ranks(_runs, 1, folder, {f"refused-{n}": words for n, words in enumerate(cases.values())})
    assert len(refused) == len(cases), refused
    for pattern, message in zip(cases, refused, strict=True):
        assert re.search(pattern, message), (pattern, message)
        assert "\n" not in message
    assert not list(folder.glob(".stored*")), "nothing half-written is left"
    for word, match in (
        ("world.tensor=2", "world.tensor=2 does not work with distill.teacher: set it to 1"),
        ("moe.kind=dense", "moe.kind=dense does not work with distill.router_steps=1: set it to clustered or standard"),
        ("train.steps=0", "train.steps"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_config(None, ["distill.teacher=x", "distill.router_steps=1", word])
    with pytest.raises(ConfigError, match=r"distill.router_steps=1 does not work with no distill\.teacher"):
        load_config(None, ["distill.router_steps=1"])


def test_a_few_stored_tokens_are_a_lower_bound(folder: Path, tmp_path: Path) -> None:
    for kept in ("runs", "cache"):
        (tmp_path / kept).symlink_to(folder / kept)
    run_ranks(_runs, 1, tmp_path, {"few": STORED}, 4)
    few, whole = (_summary(folder, name)["teacher"]["before"] for name in ("few", "live"))
    assert few["teacher_loss"] == pytest.approx(whole["teacher_loss"], rel=1e-5)
    assert 0 < few["divergence"] < whole["divergence"]
    assert torch.tensor(few["divergence"]).isfinite()
