"""Tasks of lm-evaluation-harness on a run: the same numbers as the harness's `hf` model on the exported folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ConfigError, LaunchError
from moe_dist.evaluation.spec import parse_tasks
from tests.distributed.ranks import run_ranks
from tests.unit.integrations.random_runs import random_runs

lm_eval = pytest.importorskip("lm_eval", reason="needs moe-dist[lm-eval]")
pytestmark = pytest.mark.timeout(300)

CHOICE = """task: small_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """task: small_text
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
CONTINUED = """task: small_continued
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: bleu}]
"""
TASKS = ("small_choice", "small_text", "small_continued")


def _task_folder(folder: Path) -> Path:
    words = "the clusters of experts share one base and keep residuals of low rank for a token".split()  # noqa: SIM905
    rows = [
        {
            "question": " ".join(words[i:] + words[:i]),
            "choices": [f" {words[i]}", f" {words[-i]} {words[i]}", " base"],
            "answer": i % 3,
            "text": " ".join(words[: i + 2] * 12),
        }
        for i in range(1, 9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in zip(TASKS, (CHOICE, ROLLING, CONTINUED), strict=True):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", json.dumps(str(folder / "rows.jsonl"))))
    return folder


def _on_ranks(run: str, folder: str) -> dict[str, Any]:
    from moe_dist.config import WorldConfig
    from moe_dist.evaluation.evaluate import evaluate
    from moe_dist.evaluation.spec import EvalSpec
    from moe_dist.integrations.lm_eval import harness_figures

    spec = EvalSpec(Path(run), tuple(f"lm-eval:{name}" for name in TASKS), include_path=Path(folder))
    world = WorldConfig(backend="gloo", cluster=2, timeout_seconds=100)
    found: dict[str, Any] = evaluate(world, spec, harness=harness_figures)["lm_eval"]
    return found


def test_a_run_scores_like_its_exported_folder(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    from moe_dist.checkpoint.trained_weights import find_weights
    from moe_dist.evaluation.trained_model import tokenizer_of
    from moe_dist.integrations.huggingface.export_model import export_model
    from moe_dist.integrations.huggingface.registered import register

    run, exported = tmp_path / "run", tmp_path / "exported"
    folder = _task_folder(tmp_path)
    run_ranks(random_runs, 1, {run: []})
    export_model(find_weights(run), tokenizer_of(run, find_weights(run)), exported)
    register()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = {"pretrained": str(exported), "device": "cpu", "batch_size": 8}
    expected = lm_eval.simple_evaluate(
        "hf", model_args=options, tasks=list(TASKS), task_manager=manager, log_samples=False, bootstrap_iters=0
    )["results"]
    found = run_ranks(_on_ranks, 2, str(run), str(folder), timeout=240)[0]["tasks"]
    assert found.keys() == expected.keys() == {*TASKS}
    for task, metrics in expected.items():
        numbers = {name for name, value in metrics.items() if isinstance(value, float) and "stderr" not in name}
        assert numbers, task
        for name in numbers:
            assert found[task][name] == pytest.approx(metrics[name], rel=1e-5), (task, name)


def test_tasks_are_checked_before_a_rank_starts() -> None:
    assert parse_tasks(["lm-eval:piqa,arc_easy", "wikitext"]) == ("lm-eval:piqa", "lm-eval:arc_easy", "wikitext")
    with pytest.raises(LaunchError, match=r"give wikitext, glue, .* or lm-eval:NAME,NAME"):
        parse_tasks(["lm-eval"])
    with pytest.raises(LaunchError, match="give wikitext"):
        parse_tasks(["lm-eval:piqa,"])


def test_an_unknown_task_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    from moe_dist.integrations.lm_eval import _task_manager

    with pytest.raises(ConfigError, match=r"--include-path .*/nope: no such folder"):
        _task_manager(["piqa"], tmp_path / "nope")
