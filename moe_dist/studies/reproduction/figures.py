"""Figures by kind, from summaries and evaluations: means and spreads over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from moe_dist.config import RunConfig
from moe_dist.config.layer_kinds import shared_expert_parameters
from moe_dist.metrics.summary import look_up

Tree = dict[str, Any]
FROM_SUMMARY = {
    "loss": "validation.loss",
    "perplexity": "validation.perplexity",
    "parameters": "parameters.total",
    "expert_parameters": "parameters.expert",
    "bytes_per_token_layer": "all_to_all.bytes_per_token_layer",
    "load_variance": "load.variance",
    "load_cv2": "load.cv2",
    "tokens_per_second": "tokens_per_second",
    "peak_rss_bytes": "memory.peak_rss_bytes",
    "peak_device_bytes": "memory.peak_device_bytes",
    "training_bytes": "memory.device_bytes",
    "moved_experts": "recluster.moved_experts",
}
FROM_EVALUATION = {
    "token_perplexity": "wikitext.token_perplexity",
    "word_perplexity": "wikitext.word_perplexity",
    "glue": "glue.average.mean",
    "glue_without_wnli": "glue.average_without_wnli.mean",
}
NAMES = (*FROM_SUMMARY, "expert_share", "active_work", "copies", *FROM_EVALUATION)


@dataclass(frozen=True)
class Result:
    """One training and its evaluation.

    Attributes:
        run: folder of the training.
        problems: one line per failed part.
    """

    kind: str
    seed: int
    config: RunConfig | None
    summary: Tree | None = None
    evaluation: Tree | None = None
    run: Path | None = None
    problems: tuple[str, ...] = ()

    def figures(self) -> dict[str, float]:
        """Return all available figures by the names in `NAMES`."""
        summary, evaluation = self.summary or {}, self.evaluation or {}
        found = {name: look_up(summary, key) for name, key in FROM_SUMMARY.items()}
        found.update({name: look_up(evaluation, key) for name, key in FROM_EVALUATION.items()})
        if standard := look_up(summary, "parameters.expert_standard"):
            found["expert_share"] = look_up(summary, "parameters.expert") / standard
        if self.config is not None and self.summary is not None:
            found["active_work"] = active_work(self.config)
            found["copies"] = self.config.moe.layer_kind.copies(self.config.moe)
        return {name: float(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class KindRow:
    """Figures of a kind over its seeds.

    Attributes:
        values: figure -> seed -> value.
    """

    kind: str
    values: dict[str, dict[int, float]]
    problems: tuple[str, ...]

    def middle(self, name: str) -> float | None:
        """Return the mean over seeds."""
        return mean(self.values[name].values()) if self.values.get(name) else None

    def spread(self, name: str) -> float | None:
        """Return the sample standard deviation over seeds; None for fewer than two."""
        values = self.values.get(name, {})
        return stdev(values.values()) if len(values) > 1 else None


def active_work(config: RunConfig) -> float:
    """Return the forward FLOPs of the feed-forward part per token and layer, without routers."""
    d, moe = config.model.hidden_size, config.moe
    work = moe.layer_kind.work(d, moe)
    return work.rows * work.row + 2 * shared_expert_parameters(d, moe) if moe.layer_kind.routed else work.token


def rows(results: Sequence[Result]) -> list[KindRow]:
    """Return one row for each kind, in the results' order."""
    kinds = dict.fromkeys(result.kind for result in results)
    return [_row(kind, [result for result in results if result.kind == kind]) for kind in kinds]


def _row(kind: str, members: Sequence[Result]) -> KindRow:
    values: dict[str, dict[int, float]] = {}
    for member in members:
        for name, value in member.figures().items():
            values.setdefault(name, {})[member.seed] = value
    problems = tuple(dict.fromkeys(problem for member in members for problem in member.problems))
    return KindRow(kind, values, problems)


def row_of(table: Sequence[KindRow], kind: str) -> KindRow | None:
    """Return the row of a kind; None if nothing of it was measured."""
    return next((row for row in table if row.kind == kind and row.values), None)
