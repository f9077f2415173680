"""`moe-dist eval` on one rank: runs all requested tasks on one trained model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_dist.config import MemoryConfig, RunConfig, WorldConfig, load_config
from moe_dist.console import wide_console
from moe_dist.distributed.init import init_distributed, shutdown
from moe_dist.errors import ConfigError
from moe_dist.evaluation import tables as view
from moe_dist.evaluation.fine_tune import FineTuning
from moe_dist.evaluation.glue import GlueSpec, evaluate_glue
from moe_dist.evaluation.perplexity import perplexity
from moe_dist.evaluation.spec import HELD_OUT, EvalSpec
from moe_dist.evaluation.texts import EncodedText, encode_text, held_out_text, open_text
from moe_dist.evaluation.trained_model import EvaluatedModel, open_evaluated_model
from moe_dist.metrics import installed_versions, write_json

Figures = dict[str, Any]
Harness = Callable[[EvaluatedModel, EvalSpec], Figures]
"""Function that returns the figures of the tasks of lm-evaluation-harness."""


def evaluate(
    world: WorldConfig, spec: EvalSpec, memory: MemoryConfig | None = None, harness: Harness | None = None
) -> Figures:
    """Run every task, and show and write the figures on rank 0; collective.

    Args:
        memory: memory tiers, see `open_evaluated_model`.
        harness: runs the tasks `lm-eval:NAME` of the specification; None: there are none.

    Raises:
        MoeDistError: the run, the data or the options are invalid.
    """
    process = init_distributed(world)
    with open_evaluated_model(spec.run, process, world, spec.dtype, memory) as subject:
        figures = _figures(subject, spec, _say if process.rank == 0 else _silent)
        if harness is not None:
            figures["lm_eval"] = harness(subject, spec)
    if process.rank == 0:
        view.render(figures, wide_console())
        if spec.json_file is not None:
            write_json(Path(spec.json_file), figures)
    shutdown()
    return figures


def run_evaluation(config: RunConfig, spec: EvalSpec) -> None:
    """Evaluate as one rank of a job whose configuration holds nothing but the section `world`; collective."""
    evaluate(config.world, spec, load_config(None, spec.memory).memory)


def _figures(subject: EvaluatedModel, spec: EvalSpec, say: Callable[[str], None]) -> Figures:
    figures = _facts(subject, spec)
    if HELD_OUT in spec.tasks:
        trained = subject.weights.manifest.data
        figures["held_out"] = _perplexity(subject, spec, lambda: held_out_text(subject.config, trained))
    if "wikitext" in spec.tasks:

        def read() -> EncodedText:
            return encode_text(open_text(spec.text, spec.split, spec.subset), subject.tokenizer)

        figures["wikitext"] = {"split": spec.split, **_perplexity(subject, spec, read)}
    if any(task.startswith("glue") for task in spec.tasks):
        figures["glue"] = evaluate_glue(subject, _glue_spec(spec), spec.dtype, say)
    if subject.memory is not None:
        figures["offload"] = subject.memory.tiers.totals(subject.process.device)
    return figures


def _glue_spec(spec: EvalSpec) -> GlueSpec:
    names = tuple(task.removeprefix("glue:") for task in spec.tasks if task.startswith("glue:"))
    tuning = FineTuning(spec.epochs, spec.glue_batch, spec.learning_rate, spec.max_steps)
    return GlueSpec(
        None if "glue" in spec.tasks else names, spec.glue, spec.seeds, spec.max_train, spec.max_eval, tuning
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    """Discard output on ranks other than 0."""


def _facts(subject: EvaluatedModel, spec: EvalSpec) -> Figures:
    return {
        "run": str(spec.run),
        "name": subject.config.name,
        "kind": subject.config.moe.kind,
        "step": subject.weights.manifest.step,
        "seed": subject.config.seed,
        "ranks": subject.process.ranks,
        "dtype": spec.dtype,
        "versions": installed_versions(),
    }


def _perplexity(subject: EvaluatedModel, spec: EvalSpec, read: Callable[[], EncodedText]) -> Figures:
    longest = subject.config.model.sequence_length
    length = spec.window or longest
    if length > longest:
        raise ConfigError(f"--window {length} is longer than the sequences of training: {longest}")
    stride = spec.stride or max(1, length // 2)
    if stride > length:
        raise ConfigError(f"--stride {stride} is longer than a window of {length} tokens: tokens would be left out")
    text = read()  # which takes long, after the refusals above
    found = perplexity(subject.model(getattr(torch, spec.dtype)), text, length, stride, spec.batch, subject.process)
    facts = {"source": text.source, "window": length, "stride": stride}
    return {**facts, "documents": text.documents, **found.figures()}
