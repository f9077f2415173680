"""Agreement of clusters with the domains of a text.

Trains recipes of the quality comparison on a mixture of clearly different domains, then routes held-out text of each
domain through the trained model and counts the experts that it uses.

Shapes: D domains, L layers, E experts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from moe_dist.clustering import adjusted_rand_index
from moe_dist.config import WorldConfig
from moe_dist.console import titled_table
from moe_dist.data.domains import TRAIN, write_domains
from moe_dist.data.files import FileSource
from moe_dist.distributed.init import init_distributed, shutdown
from moe_dist.evaluation.texts import encode_text
from moe_dist.evaluation.trained_model import open_evaluated_model
from moe_dist.evaluation.windows import window_batches
from moe_dist.model.language_model import LanguageModel
from moe_dist.report.read import read_runs
from moe_dist.studies.quality import cells
from moe_dist.studies.runner import StudyOutcome, require_all, run_cells, validation_loss

RECIPES = ("cheap", "cheap-random", "cheap-parameter", "cheap-activation", "cheap-fused")
BATCH = 8  # windows at a time


@dataclass(frozen=True)
class DomainSpec:
    """Recipes to train, and the amount of text; `characters` per domain."""

    configs: Path
    folder: Path
    recipes: tuple[str, ...] = RECIPES
    seeds: int = 3
    jobs: int = 2
    characters: int = 1_500_000
    english: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class DomainRun:
    """Figures of one trained run.

    Attributes:
        index: adjusted Rand index between experts' dominant domains and their clusters, mean over layers.
        purity: share of an expert's copies that belong to its dominant domain, mean over experts; 1 / D by chance.
        moved: experts that changed their cluster in training, over all layers and rounds.
        round_seconds: time of all re-clustering rounds.
    """

    recipe: str
    seed: int
    loss: float
    index: float
    purity: float
    load_variance: float
    moved: int
    round_seconds: float
    seconds: float


def run_domains(spec: DomainSpec, report: Callable[[str], None]) -> list[DomainRun]:
    """Train the missing runs and measure all.

    Raises:
        DataError: this machine has too little text.
        MoeDistError: a run failed.
    """
    text = spec.folder / "text"
    held = write_domains(text, 0, spec.characters, english=spec.english)
    paths = json.dumps([str((text / TRAIN).absolute())])
    validation = json.dumps([str(file.absolute()) for file in held.values()])
    selection = ("corpus.kind=text", f"corpus.paths={paths}", f"corpus.validation_paths={validation}")
    todo = cells(spec.configs, {"domains": selection}, spec.seeds, spec.recipes, spec.overrides)
    outcomes = run_cells(todo, spec.folder, report, validation_loss, jobs=spec.jobs)
    require_all(outcomes)
    return [_measure(outcome, held, spec.folder) for outcome in outcomes]


def _measure(outcome: StudyOutcome, held: Mapping[str, Path], folder: Path) -> DomainRun:
    cell, summary = outcome.cell, outcome.summary or {}
    run = folder / "runs" / cell.run_name(folder)
    count_DLE, cluster_LE = domain_counts(run, held)
    rounds = [event for event in read_runs([run])[0].events if event.get("event") == "recluster"]
    return DomainRun(
        cell.value("recipe"),
        cell.repeat,
        summary["validation"]["loss"],
        domain_index(count_DLE, cluster_LE),
        domain_purity(count_DLE),
        summary["load"]["variance"],
        sum(event.get("moved_experts", 0) for event in rounds),
        sum(event.get("seconds", 0.0) for event in rounds),
        summary["seconds"],
    )


def domain_counts(run: Path, held: Mapping[str, Path]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return count_DLE, token copies of each domain per expert, and cluster_LE, the cluster of each expert.

    Raises:
        CheckpointError: the run has no weights.
    """
    process = init_distributed(WorldConfig(threads=1))
    try:
        subject = open_evaluated_model(run, process, WorldConfig(), "float32")
        model, length = subject.model(torch.float32), subject.config.model.sequence_length
        texts = [encode_text(FileSource((file,), "text"), subject.tokenizer) for file in held.values()]
        count_DLE = np.stack([_count(model, text.ids, length) for text in texts])
        return count_DLE, np.array([placement.cluster_of() for placement in model.context.placements])
    finally:
        shutdown()


def _count(model: LanguageModel, ids: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Return count_LE of one text."""
    balance = model.context.balance
    with model.evaluating():
        balance.counting = True
        balance.clear_counts()
        for window in window_batches(ids, length, length, 0, 1, BATCH):
            model.token_losses(window.sequence_bS.to(balance.count_LE.device))
        return balance.count_LE.cpu().numpy().copy()


def domain_share(count_DLE: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return share_DLE: each domain's share of an expert's copies if all domains had equally many tokens."""
    count_DLE = np.asarray(count_DLE, dtype=np.float64)
    of_domain_DLE = count_DLE / np.maximum(count_DLE.sum(axis=2, keepdims=True), 1)
    share_DLE: npt.NDArray[np.float64] = of_domain_DLE / np.maximum(of_domain_DLE.sum(axis=0), 1e-12)
    return share_DLE


def domain_index(count_DLE: npt.ArrayLike, cluster_LE: npt.ArrayLike) -> float:
    """Return the adjusted Rand index between experts' dominant domains and their clusters, mean over layers."""
    dominant_LE = domain_share(count_DLE).argmax(axis=0)
    return mean(adjusted_rand_index(a_E, b_E) for a_E, b_E in zip(dominant_LE, np.asarray(cluster_LE), strict=True))


def domain_purity(count_DLE: npt.ArrayLike) -> float:
    """Return the dominant domain's share of an expert's copies, mean over all experts of all layers."""
    return float(domain_share(count_DLE).max(axis=0).mean())


def render(runs: Sequence[DomainRun], console: Console) -> None:
    """Print one row per recipe, with differences to the first recipe seed by seed."""
    view = titled_table("mixture of four domains, mean ± standard deviation over seeds")
    for name in ("recipe", "loss", f"less {runs[0].recipe}", "index", "purity", "load variance", "moved", "rounds"):
        view.add_column(name, justify="left" if name == "recipe" else "right")
    base = {run.seed: run.loss for run in runs if run.recipe == runs[0].recipe}
    for recipe in dict.fromkeys(run.recipe for run in runs):
        own = [run for run in runs if run.recipe == recipe]
        less = [run.loss - base[run.seed] for run in own]
        view.add_row(
            recipe,
            _spread([run.loss for run in own], 4),
            f"{mean(less):+.4f} ({min(less):+.4f} to {max(less):+.4f})",
            _spread([run.index for run in own], 2),
            _spread([run.purity for run in own], 2),
            f"{mean(run.load_variance for run in own):.2e}",
            f"{mean(run.moved for run in own):.0f}",
            f"{mean(run.round_seconds / run.seconds for run in own):.2%}",
        )
    console.print(view)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0:.{digits}f}"
