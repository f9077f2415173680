"""Tasks of lm-evaluation-harness on a trained run, by the harness's own model class and API, on any number of ranks.

Ranks share the experts, and each of them computes every request: so all of them take part in each all-to-all.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConfigError
from moe_dist.evaluation.evaluate import Figures, evaluate
from moe_dist.evaluation.spec import HARNESS, EvalSpec
from moe_dist.evaluation.trained_model import EvaluatedModel, quantized_as_stored
from moe_dist.integrations.huggingface.export_model import tokenizer_files
from moe_dist.integrations.huggingface.transformers_library import require_transformers
from moe_dist.model.language_model import LanguageModel


def run_with_harness(config: RunConfig, spec: EvalSpec) -> None:
    """Evaluate as one rank, as `run_evaluation` does, with the tasks of the harness; collective."""
    evaluate(config.world, spec, load_config(None, spec.memory).memory, harness_figures)


def harness_figures(subject: EvaluatedModel, spec: EvalSpec) -> Figures:
    """Return the results of the harness's tasks by task and metric, on rank 0; collective.

    Raises:
        ConfigError: the harness is not installed, or has no such task.
    """
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise ConfigError(
            f"--task lm-eval needs the package lm-eval ({error}): pip install 'moe-dist[lm-eval]'"
        ) from error
    names = [task.removeprefix(HARNESS) for task in spec.tasks if task.startswith(HARNESS)]
    manager = _task_manager(names, spec.include_path)
    model = subject.model(getattr(torch, spec.dtype))
    scored = _harness_model(model, subject, spec.batch)
    with model.evaluating(), quantized_as_stored(model):
        found = simple_evaluate(
            scored,
            tasks=names,
            num_fewshot=spec.num_fewshot,
            limit=spec.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=100_000 if subject.process.rank == 0 else 0,
        )
    if found is None:  # the harness gives them to the first rank of each machine
        return {}
    return {"tasks": found["results"], "versions": found["versions"], "shots": found["n-shot"]}


def _harness_model(model: LanguageModel, subject: EvaluatedModel, batch: int) -> Any:
    """Return the harness's `hf` model, with our model and the run's tokenizer in it."""
    transformers = require_transformers()
    from lm_eval.models.huggingface import HFLM

    with TemporaryDirectory(prefix="moe-dist-") as folder:
        for name, content in tokenizer_files(subject.tokenizer).items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    scored = _ScoredModel(model, subject.config.model.sequence_length)
    return HFLM(pretrained=scored, backend="causal", tokenizer=tokenizer, batch_size=batch)


class _ScoredModel(nn.Module):
    """Our model with as much of the interface of a causal model of transformers as the harness uses; no KV cache."""

    def __init__(self, model: LanguageModel, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(max_position_embeddings=max_length, model_type="moe_dist")
        self.device = next(model.parameters()).device

    def tie_weights(self) -> None:
        """Do nothing: tied weights are one parameter."""

    def forward(self, tokens_BS: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """Return `logits`; where `attention_mask` [B, S] is 0 there is padding."""
        length = tokens_BS.shape[1]
        position_BS = torch.arange(length, device=self.device).expand_as(tokens_BS)
        mask_B1SS = None
        if attention_mask is not None:
            causal_SS = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
            own_SS = torch.eye(length, dtype=torch.bool, device=self.device)  # a row without any would be NaN
            mask_B1SS = (causal_SS & attention_mask.bool()[:, None] | own_SS)[:, None]
        return SimpleNamespace(logits=self.model.gpt(tokens_BS, position_BS, mask_B1SS))

    def generate(
        self, input_ids: Tensor, max_length: int, stopping_criteria: Any, pad_token_id: int, **options: Any
    ) -> Tensor:
        """Return `input_ids` [B, S], padded on the left, with the most likely continuation of each.

        Raises:
            ConfigError: the task samples.
        """
        if options.get("do_sample"):
            raise ConfigError("a task of lm-eval with do_sample=true is not supported: only greedy generation is")
        ids_BS, mask_BS = input_ids, options["attention_mask"]
        ended_B = torch.zeros(len(ids_BS), dtype=torch.bool, device=self.device)
        while ids_BS.shape[1] < max_length and not ended_B.all():
            next_B = self(ids_BS, mask_BS).logits[:, -1].argmax(-1).masked_fill(ended_B, pad_token_id)
            ids_BS = torch.cat([ids_BS, next_B[:, None]], dim=1)
            mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], dim=1)
            ended_B |= stopping_criteria(ids_BS, None)
        return ids_BS


def _task_manager(names: list[str], include_path: Path | None) -> Any:
    """Return the harness's registry of the tasks: those of `include_path`, and its own if others are wanted."""
    from lm_eval.tasks import TaskManager

    manager = None
    if include_path is not None:
        if not include_path.is_dir():
            raise ConfigError(f"--include-path {include_path}: no such folder")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not {*names} <= {*manager.all_tasks}:
        manager = TaskManager(include_path=include_path and str(include_path))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(
            f"--task lm-eval:{','.join(unknown)}: lm-eval has no such task; `lm-eval ls tasks` lists them"
        )
    return manager
