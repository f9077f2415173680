"""Evaluation of trained runs: perplexity against a slow reference, and GLUE learnt, on one rank and on several."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import MemoryConfig, WorldConfig, load_config
from moe_dist.distributed.init import init_distributed
from moe_dist.errors import ConfigError, MoeDistError, OffloadError
from moe_dist.evaluation.evaluate import evaluate
from moe_dist.evaluation.spec import EvalSpec
from moe_dist.evaluation.texts import EncodedText, encode_text, open_text
from moe_dist.evaluation.trained_model import EvaluatedModel, open_evaluated_model
from moe_dist.memory.owned_folder import OwnedFolder
from moe_dist.moe.quantized_experts import stored_sizes
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"
TEXT = " \n = Title = \n \n Some words , and a few more of them , in 3 lines . \n" * 3
SPEC: dict[str, Any] = {"batch": 3, "seeds": 1, "epochs": 1.0, "glue_batch": 8}
WORLD = WorldConfig(backend="gloo", timeout_seconds=60)


def _train(folder: Path, *more: str) -> None:
    words = [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "tensorboard=false", "train.eval_every=0"]
    train(load_config(SMOKE, [*words, "train.steps=3", *more]))


def _evaluate(run: Path, more: dict[str, Any], memory: MemoryConfig | None = None) -> Any:
    return evaluate(WORLD, EvalSpec(**{"run": run, **SPEC, **more}), memory)


def _by_hand(run: Path, file: Path, stride: int) -> float:
    """Nats of the whole text: every token predicted alone, from the tokens its window has before it."""
    subject: EvaluatedModel = open_evaluated_model(run, init_distributed(WORLD), WORLD, "float32")
    text: EncodedText = encode_text(open_text(file, "validation"), subject.tokenizer)
    model, length = subject.model(torch.float32), subject.config.model.sequence_length
    nats = 0.0
    with model.evaluating():
        for target in range(1, len(text.ids)):
            window = max(0, -(-(target - length) // stride))
            context = torch.from_numpy(text.ids[window * stride : target + 1])[None]
            nats += float(model.token_losses(context)[0, -1])
    return nats


@pytest.mark.parametrize("more", [[], ["moe.top_clusters=2", "moe.capacity_factor=1.0"]], ids=["m=1", "m=2 that drops"])
def test_any_number_of_ranks_gives_the_perplexity_of_the_reference(tmp_path: Path, more: list[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    run_ranks(_train, 2, tmp_path, *more)
    run, stride = tmp_path / "runs" / "smoke", 7
    (expected,) = run_ranks(_by_hand, 1, run, file, stride)
    for ranks in (1, 4):
        target = tmp_path / f"{ranks}.json"
        options = {"text": file, "stride": stride, "json_file": str(target)}
        found = run_ranks(_evaluate, ranks, run, options)
        figures = json.loads(target.read_text())["wikitext"]
        assert all(rank["wikitext"]["nats"] == figures["nats"] for rank in found)
        assert figures["nats"] == pytest.approx(expected, rel=1e-6)
        assert (figures["words"], figures["line_ends"]) == (len(TEXT.split()), TEXT.count("\n"))


def test_the_held_out_text_of_a_run_is_its_validation_text(tmp_path: Path) -> None:
    file, train_file = tmp_path / "text.txt", tmp_path / "train.txt"
    text = "Some words , and a few more of them , in several lines .\n" * 5
    file.write_text(text)
    train_file.write_text("\n\n".join(f"number {at} = {at * at} , and some words" for at in range(2000)))
    corpus = ["corpus.kind=text", f"corpus.paths={train_file}", f"corpus.validation_paths={file}"]
    run_ranks(_train, 1, tmp_path, *corpus, "tokenizer.vocab_size=320", "model.sequence_length=16")
    run, stride = tmp_path / "runs" / "smoke", 7
    (expected,) = run_ranks(_by_hand, 1, run, file, stride)
    for found in run_ranks(_evaluate, 2, run, {"tasks": ("held-out",), "stride": stride}):
        assert found["held_out"]["nats"] == pytest.approx(expected, rel=1e-6)
        assert found["held_out"]["words"] == len(text.split())
    file.write_text(text + "One more line , which is new .\n")
    with pytest.raises(AssertionError, match="DataError: the run's text has changed since it was trained"):
        run_ranks(_evaluate, 1, run, {"tasks": ("held-out",)})


def _said(run: Path, more: dict[str, Any], memory: MemoryConfig) -> tuple[type, str]:
    with pytest.raises((MoeDistError, ConnectionError)) as caught:
        _evaluate(run, more, memory)
    return caught.type, str(caught.value)


def test_a_stored_export_is_evaluated_within_a_budget(tmp_path: Path) -> None:
    """Where one rank cannot have its directory, the other ends with it."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"text": tmp_path / "text.txt"}
    run_ranks(_train, 1, tmp_path, "precision.residuals=post")
    run = tmp_path / "runs" / "smoke"
    file = run / "smoke.safetensors"
    export_weights(find_weights(run), file, stored=True)
    cluster = stored_sizes(find_weights(file).config, 4).nbytes + 48
    memory = MemoryConfig(offload=True, device_budget_bytes=cluster)
    in_memory = run_ranks(_evaluate, 2, file, options)
    for found, expected in zip(run_ranks(_evaluate, 2, file, options, memory), in_memory, strict=True):
        assert "offload" not in expected
        assert found["wikitext"] == expected["wikitext"]
        assert found["offload"]["peak_device_bytes"] <= cluster
        assert found["offload"]["bytes_in"] > 0
    assert not (run / ".offload").exists()
    taken = OwnedFolder(run / ".offload" / "smoke.safetensors" / "rank-00001")
    (follows, why), (own, said) = run_ranks(_said, 2, file, options, memory)
    taken.close()
    assert (follows, own) == (ConnectionError, OffloadError)
    assert "rank-00001 is used by another run" in said
    assert why == f"rank 1 failed: {said}"
    assert "not " + str(run) in run_ranks(_said, 1, run, options, memory)[0][1]


def _write_task(folder: Path) -> None:
    rows = [
        {"sentence": f"this {('film', 'book', 'song')[n % 3]} was {('bad', 'good')[n % 2]} .", "label": n % 2, "idx": n}
        for n in range(64)
    ]
    (folder / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["clustered", "standard", "dense"])
def test_a_task_is_learnt_by_every_kind_on_several_ranks(tmp_path: Path, kind: str) -> None:
    _write_task(tmp_path / "glue")
    run_ranks(_train, 1, tmp_path, f"moe.kind={kind}")
    options = {
        "tasks": ("glue:sst2",),
        "glue": tmp_path / "glue",
        "epochs": 8.0,
        "learning_rate": 0.01,
        "seeds": 1,
    }
    first, second = run_ranks(_evaluate, 2, tmp_path / "runs" / "smoke", options)
    assert first == second
    accuracy = first["glue"]["tasks"]["sst2"]["metrics"]["accuracy"]
    assert len(accuracy["values"]) == 1
    assert accuracy["mean"] > 90
    assert first["glue"]["average"]["mean"] == accuracy["mean"]


def _refused(run: Path, more: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        _evaluate(run, more)
    return str(refused.value)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    run_ranks(_train, 1, tmp_path, "moe.kind=dense")
    run = tmp_path / "runs" / "smoke"
    cases = {
        "--window 99 is longer than the sequences": {"window": 99},
        "--stride 20 is longer than a window of 16 tokens": {"window": 16, "stride": 20},
        "holds no task's folder": {"tasks": ("glue",), "glue": tmp_path},
        "--glue-batch 3 is not divisible": {"tasks": ("glue:cola",), "glue_batch": 3},
    }
    for said, options in cases.items():
        assert all(said in answer for answer in run_ranks(_refused, 2, run, options))
