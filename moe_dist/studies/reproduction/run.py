"""Runner of a reproduction: runs the missing parts and writes the results after every seed."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from moe_dist.data import prepare_data
from moe_dist.errors import DataError, MoeDistError
from moe_dist.evaluation.glue_data import has_task, load_task
from moe_dist.evaluation.glue_tasks import TASKS
from moe_dist.metrics import installed_versions, source_commit, write_json
from moe_dist.studies.reproduction import evaluations as evaluate
from moe_dist.studies.reproduction import tables
from moe_dist.studies.reproduction.cells import Setting, grid_cells, kind_of, main_cells
from moe_dist.studies.reproduction.evaluations import Evaluations
from moe_dist.studies.reproduction.figures import Result, rows
from moe_dist.studies.reproduction.plots import plot_all
from moe_dist.studies.reproduction.progress import StudyProgress
from moe_dist.studies.reproduction.scales import BASELINES, DENSE, FEW, KINDS, RecipeKind
from moe_dist.studies.reproduction.tables import Rates
from moe_dist.studies.runner import StudyCell, StudyOutcome, finish, known, validation_loss

RATE, RESULTS = "rate", "results.json"


@dataclass(frozen=True)
class ReproductionPlan:
    """Parts of a reproduction.

    Attributes:
        limit: time limit of one training or evaluation, seconds.
        jobs: trainings, or evaluations, at a time.
    """

    setting: Setting
    kinds: Sequence[RecipeKind]
    seeds: int
    grid: bool
    evaluations: Evaluations
    launcher: str
    limit: float | None = None
    jobs: int = 1

    @property
    def folder(self) -> Path:
        """Folder of all results."""
        return self.setting.folder

    @property
    def words(self) -> list[str]:
        """Options of every evaluation."""
        return self.evaluations.words(self.setting.scale)

    @property
    def told(self) -> list[str]:
        """Conditions of the measurement, in words."""
        config = self.setting.load()
        tokens = config.train.steps * config.train.global_batch_size * config.model.sequence_length
        corpus = config.corpus
        text = {"text": ", ".join(Path(path).name for path in corpus.paths), "hub": f"{corpus.name} {corpus.subset}"}
        text["blend"] = ", ".join(corpus.sources)
        versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
        return [
            f"Scale {self.setting.scale.name}: {config.train.steps} steps, {tokens:,} tokens of "
            f"{text.get(corpus.kind, 'the standard library')} a run, {self.setting.scale.ranks} rank(s), "
            f"{config.train.precision}, {self.seeds} seed(s); the same batches for all kinds.",
            f"Versions: {versions}; commit {source_commit() or 'unknown'}.",
        ]

    @property
    def grid_cells(self) -> list[StudyCell]:
        """Short runs that choose learning rates; empty without a grid."""
        return grid_cells(self.setting, self.kinds) if self.grid else []


def reproduce(plan: ReproductionPlan, say: Callable[[str], None]) -> list[Result]:
    """Run everything; report a part that fails and continue. Results are written after every seed."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    progress = _progress(plan, say)
    results: list[Result] = []
    with ThreadPoolExecutor(plan.jobs) as pool:
        grid = _rates_of_grid(list(pool.map(lambda cell: _train(plan, cell, "grid", progress), plan.grid_cells)))
        cells = main_cells(plan.setting, plan.kinds, plan.seeds, best_rates(grid))
        for result in pool.map(lambda cell: _trained_and_evaluated(plan, cell, progress), cells):
            results.append(result)
            if len(results) % len(plan.kinds) == 0:
                write_results(plan, results, grid)
    return results


def require_data(plan: ReproductionPlan) -> None:
    """Prepare the text and read GLUE's local data once, so that their errors come before any run.

    Raises:
        DataError: the text is not available, or a task's data are wrong.
    """
    config = plan.setting.load()
    prepare_data(config.corpus, config.tokenizer)
    if plan.evaluations.glue in (None, "hub"):
        return
    folder = Path(str(plan.evaluations.glue))
    there = [task for task in TASKS.values() if has_task(task, folder)]
    if not there:
        raise DataError(f"--glue {folder}: holds no folder of a task: {', '.join(TASKS)}")
    for task in there:
        load_task(task, folder)


def gather(plan: ReproductionPlan) -> list[Result]:
    """Return the available results and run nothing."""
    grid = known_grid(plan)
    cells = main_cells(plan.setting, plan.kinds, plan.seeds, best_rates(grid))
    results = []
    for cell in cells:
        result = _result(known(cell, plan.folder) or _missing(cell), plan.folder)
        if result.summary is not None and plan.words:
            figures = evaluate.known(cell, plan.folder, plan.words)
            result = replace(
                result, evaluation=figures, problems=() if figures else (f"seed {cell.repeat}: not evaluated yet",)
            )
        results.append(result)
    write_results(plan, results, grid)
    return results


def require_all(plan: ReproductionPlan, results: Sequence[Result]) -> None:
    """Check that no part has failed.

    Raises:
        MoeDistError: parts of available kinds have failed; names them.
    """
    can = {kind.name for kind in plan.kinds if kind.is_available}
    failed = [f"{r.kind} seed {r.seed} ({'; '.join(r.problems)})" for r in results if r.problems and r.kind in can]
    if failed:
        raise MoeDistError(f"{len(failed)} of {len(results)} runs are incomplete: {', '.join(failed)}")


def known_grid(plan: ReproductionPlan) -> dict[str, dict[str, float]]:
    """Return the available losses of the grid by family and learning rate."""
    return _rates_of_grid([known(cell, plan.folder) or _missing(cell) for cell in plan.grid_cells])


def best_rates(grid: Rates) -> dict[str, float]:
    """Return the learning rate of the lowest loss, for each family with a result."""
    return {family: float(min(losses, key=lambda rate: losses[rate])) for family, losses in grid.items() if losses}


def write_results(plan: ReproductionPlan, results: Sequence[Result], grid: Rates) -> None:
    """Write `results.json`, `runs.csv`, `results.md` and the plots."""
    table = rows(results)
    claimed = [kind.name for kind in plan.kinds if kind.name not in (DENSE, FEW, *BASELINES) and kind.is_available]
    write_json(plan.folder / RESULTS, tables.to_dict(results, table, claimed, grid, plan.setting.scale.name))
    tables.write_csv(results, plan.folder / "runs.csv")
    (plan.folder / "results.md").write_text(tables.markdown(table, claimed, grid, plan.told), encoding="utf-8")
    plot_all(results, table, plan.folder)


def _progress(plan: ReproductionPlan, say: Callable[[str], None]) -> StudyProgress:
    """Count the remaining parts; the trainings to run depend on the result of the grid."""
    grid = [cell for cell in plan.grid_cells if known(cell, plan.folder) is None]
    available = sum(kind.is_available for kind in plan.kinds) * plan.seeds
    left = {"grid": len(grid), "training": available, "evaluation": available * bool(plan.words)}
    if not grid:
        cells = main_cells(plan.setting, plan.kinds, plan.seeds, best_rates(known_grid(plan)))
        left["training"] = sum(known(cell, plan.folder) is None for cell in cells)
        if plan.words:
            left["evaluation"] = sum(
                not cell.refusal and evaluate.known(cell, plan.folder, plan.words) is None for cell in cells
            )
    progress = StudyProgress(left, dict(zip(left, plan.setting.scale.seconds, strict=True)), say, plan.jobs)
    sorts = ", ".join(f"{count} {sort}" for sort, count in left.items())
    say(f"{sum(left.values())} parts to run ({sorts}): {progress.remaining()}")
    return progress


def _train(plan: ReproductionPlan, cell: StudyCell, sort: str, progress: StudyProgress) -> StudyOutcome:
    if outcome := known(cell, plan.folder):
        return outcome
    found: list[StudyOutcome] = []

    def work() -> str:
        found.append(finish(cell, plan.folder, plan.launcher, plan.limit))
        summary = found[0].summary
        return validation_loss(summary) if summary else f"failed: {found[0].problem}"

    progress.run(sort, _shown(cell), work)
    return found[0]


def _trained_and_evaluated(plan: ReproductionPlan, cell: StudyCell, progress: StudyProgress) -> Result:
    return _evaluated(plan, _train(plan, cell, "training", progress), progress)


def _evaluated(plan: ReproductionPlan, outcome: StudyOutcome, progress: StudyProgress) -> Result:
    result, cell = _result(outcome, plan.folder), outcome.cell
    if result.summary is None or not plan.words:
        if plan.words and not cell.refusal:
            progress.left["evaluation"] -= 1
        return result
    if figures := evaluate.known(cell, plan.folder, plan.words):
        return replace(result, evaluation=figures)
    found: list[Result] = []

    def work() -> str:
        figures, problem = evaluate.evaluate(cell, plan.folder, plan.words, plan.limit)
        problems = () if figures else (f"seed {cell.repeat}: evaluation: {problem}",)
        found.append(replace(result, evaluation=figures, problems=problems))
        return f"failed: {problem}" if problem else "done"

    progress.run("evaluation", _shown(cell), work)
    return found[0]


def _result(outcome: StudyOutcome, folder: Path) -> Result:
    cell = outcome.cell
    problems = () if outcome.problem is None else (cell.refusal or f"seed {cell.repeat}: {outcome.problem}",)
    if outcome.summary is None:
        return Result(kind_of(cell), cell.repeat, None, problems=problems)
    run = evaluate.trained_run(cell, folder)
    return Result(kind_of(cell), cell.repeat, cell.load(), outcome.summary, None, run, problems)


def _missing(cell: StudyCell) -> StudyOutcome:
    return StudyOutcome(cell, None, "not run yet")


def _rates_of_grid(outcomes: Sequence[StudyOutcome]) -> dict[str, dict[str, float]]:
    """Return validation losses by family and learning rate; failed or diverged runs have none."""
    grid: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        kind = KINDS[kind_of(outcome.cell)]
        losses = grid.setdefault(kind.family, {})
        if outcome.summary and outcome.summary["validation"]["loss"] is not None:
            losses[dict(outcome.cell.values)[RATE]] = outcome.summary["validation"]["loss"]
    return {family: losses for family, losses in grid.items() if losses}


def _shown(cell: StudyCell) -> str:
    return " ".join([*(value for _, value in cell.values), f"seed {cell.repeat}"])
