"""A reproduction's cells, resumption, failures, claims and files; real training is tried in tests/integration."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_dist.benchmarks import subruns
from moe_dist.config import load_config
from moe_dist.errors import ConfigError, DataError, MoeDistError
from moe_dist.metrics.summary import look_up
from moe_dist.studies.reproduction import cells, run
from moe_dist.studies.reproduction.claims import verdicts
from moe_dist.studies.reproduction.evaluations import choose
from moe_dist.studies.reproduction.figures import Result, active_work, rows
from moe_dist.studies.reproduction.job_arrays import show_cost, write_arrays
from moe_dist.studies.reproduction.plots import plot_all
from moe_dist.studies.reproduction.progress import StudyProgress
from moe_dist.studies.reproduction.scales import CLASSIC, KINDS, OURS, SCALES, STRONG, RecipeKind, Scale, chosen_kinds

CONFIGS = Path(__file__).parents[3] / "configs"
FREE = {"moe", "recluster", "precision", "memory", "optimizer"}


def _setting(folder: Path, scale: str = "tiny") -> cells.Setting:
    return cells.Setting(SCALES[scale], CONFIGS, folder, cells.text_words("stdlib"))


def _plan(
    folder: Path, scale: str = "tiny", kinds: tuple[str, ...] = ("dense", CLASSIC, STRONG, OURS)
) -> run.ReproductionPlan:
    chosen = SCALES[scale]
    evaluations = choose(chosen, "stdlib", None, "/glue", None)
    return run.ReproductionPlan(
        _setting(folder, scale), [KINDS[name] for name in kinds], 2, bool(chosen.grid), evaluations, "local"
    )


@pytest.mark.parametrize("scale", SCALES)
def test_kinds_differ_in_nothing_but_what_is_compared(tmp_path: Path, scale: str) -> None:
    found = cells.main_cells(_setting(tmp_path, scale), list(KINDS.values()), 2, {"dense": 0.001})
    available = [cell for cell in found if cell.refusal != cells.UNAVAILABLE]
    assert all(cell.refusal is None for cell in available)
    assert {cells.kind_of(cell) for cell in found} == set(KINDS)
    first = [cell.load() for cell in available if cell.repeat == 0]
    assert len({config.model_dump_json(exclude=FREE) for config in first}) == 1
    assert len({cell.result_file(tmp_path) for cell in available}) == len(available)
    dense = next(config for config in first if config.moe.kind == "dense")
    assert dense.optimizer.learning_rate == 0.001
    standard = next(config for config in first if config.moe.kind == "standard")
    assert active_work(dense) == active_work(standard)


def test_what_this_version_lacks_is_said_and_not_run(tmp_path: Path) -> None:
    lacking = RecipeKind("future", "good", "clustered-fixed", needs=("telepathy",))
    (cell,) = cells.main_cells(_setting(tmp_path), [lacking], 1, {})
    assert cell.refusal == "not available in this version"


def test_texts_are_chosen() -> None:
    assert cells.text_words("hub") == ()
    config = load_config(CONFIGS / "reproduce" / "tiny.yaml", cells.text_words("a.txt,b.txt"))
    assert (config.corpus.kind, config.corpus.paths) == ("text", [str(Path("a.txt").absolute())])
    with pytest.raises(ConfigError, match=r"--text 'a.txt': write stdlib, packages, hub, or TRAIN,VALIDATION"):
        cells.text_words("a.txt")
    packages = load_config(CONFIGS / "reproduce" / "parity.yaml", cells.text_words("packages")).corpus
    assert packages.kind == "text"
    assert packages.paths[0].endswith("site-packages/**/*.py")
    tiny: Scale = SCALES["tiny"]
    assert choose(tiny, "packages", None, "none", None).words(tiny) == []
    assert choose(tiny, "a.txt,b.txt", None, "none", None).text == str(Path("b.txt").absolute())
    assert choose(tiny, "hub", None, None, "wikitext-2-raw-v1").words(tiny)[:2] == [
        "--task=wikitext",
        "--subset=wikitext-2-raw-v1",
    ]
    assert choose(tiny, "stdlib", None, "none", None).words(tiny) == []


def test_wrong_data_are_said_before_any_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Too little to learn from .\n")
    words = (*cells.text_words(f"{text},{text}"), f"corpus.cache_dir={tmp_path}/cache")
    plan = replace(_plan(tmp_path), setting=cells.Setting(SCALES["smoke"], CONFIGS, tmp_path, words))
    with pytest.raises(DataError, match="nothing to train on"):
        run.require_data(plan)


LOSSES = {"dense": 4.5, CLASSIC: 4.2, STRONG: 4.1, "clustered-fixed": 4.25, OURS: 4.15}


def _summary(kind: str, rate: float, seed: int) -> dict[str, Any]:
    standard = kind in (CLASSIC, STRONG)
    loss = LOSSES[kind] + abs(rate - 0.0056) + 0.01 * seed
    return {
        "validation": {
            "loss": loss,
            "perplexity": 2.0,
            "curve": [{"tokens": 1, "loss": 5.0}, {"tokens": 2, "loss": loss}],
        },
        "parameters": {"total": 100, "expert": 80 if standard else 15, "expert_standard": 0 if kind == "dense" else 80},
        "load": {"variance": None if kind == "dense" else 9e-4 if standard else 1e-4},
        "tokens_per_second": 1000.0,
        "all_to_all": {"bytes_per_token_layer": 700.0},
        "memory": {"peak_rss_bytes": 2**30},
    }


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started instead of real runs; the strong baseline fails, and so does an evaluation of the dense one."""
    names: list[str] = []

    def fake(command: list[str], seconds: float | None = None) -> str | None:
        target = Path(next(word for word in command if word.endswith(".json")).removeprefix("--json="))
        names.append(target.name)
        if command[3] == "eval":
            if "dense" in target.name:
                return "out of luck"
            target.write_text(json.dumps({"glue": {"average": {"mean": 60.0}}}))
            return None
        config = load_config(command[command.index("local") + 3], [w for w in command if "=" in w and w[0] != "-"])
        kind = next(name for name in sorted(LOSSES, key=len, reverse=True) if f"kind-{name}" in target.name)
        if kind == STRONG and config.seed == 1:
            return "diverged"
        target.write_text(json.dumps(_summary(kind, config.optimizer.learning_rate, config.seed % 1000)))
        return None

    monkeypatch.setattr(subruns, "run", fake)
    monkeypatch.setattr(run, "plot_all", lambda *results: [])  # drawn once, by a test of its own
    return names


def test_everything_is_run_once_and_failures_do_not_stop_the_rest(tmp_path: Path, started: list[str]) -> None:
    plan, said = _plan(tmp_path), list[str]()
    results = run.reproduce(plan, said.append)
    assert len(started) == 12 + 8 + 7  # the grid, trainings, evaluations of what was trained
    assert said[0].startswith("28 parts to run (12 grid, 8 training, 8 evaluation): about ")
    assert any("training standard-bias seed 1: failed: diverged; about" in line for line in said)
    assert said[-1].endswith("; done")
    with pytest.raises(MoeDistError, match=r"3 of 8 runs are incomplete: .*standard-bias seed 1 \(seed 1: diverged\)"):
        run.require_all(plan, results)
    best = {config.optimizer.learning_rate for result in results if (config := result.config) is not None}
    assert best == {0.0056}  # of 0.00392, 0.0056 and 0.00784
    before = len(started)
    again = run.reproduce(plan, said.append)
    assert [name.partition("-")[0] for name in started[before:]].count("eval_r2_kind") == 2  # dense's, once more
    assert len(started) - before == 3
    values = [[row.values for row in rows(found)] for found in (results, again, run.gather(plan))]
    assert values[0] == values[1] == values[2]


def test_results_are_written_with_claims_and_plots(tmp_path: Path, started: list[str]) -> None:
    results = run.reproduce(_plan(tmp_path), lambda line: None)
    plot_all(results, rows(results), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| clustered-online | 4.1550 ± 0.0071 | 60.0 |" in text
    assert "| validation loss not above, nats | standard-aux | -0.0500 (-0.0500 to -0.0500): reached |" in text
    assert "| validation loss not above, nats | standard-bias | +0.0500: not reached |" in text
    assert "| parameters of experts -80 % | standard-aux | -81.2%" in text
    assert "seed 1: diverged" in text
    assert "**4.1000**" in text  # the best of the grid
    with (tmp_path / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    assert lines[0]["problems"] == "seed 0: evaluation: out of luck"
    content = json.loads((tmp_path / "results.json").read_text())
    assert look_up(content["grid"], "dense")["0.0056"] == pytest.approx(4.5)
    for name in ("loss-tokens", "loss-parameters", "loss-work", "loss-bytes", "bytes-token", "load-variance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_claims_by_hand() -> None:
    def result(kind: str, seed: int, loss: float, cv2: float, *words: str) -> Result:
        config = load_config(CONFIGS / "model" / f"{KINDS[kind].model}.yaml", words)
        summary = {
            "validation": {"loss": loss},
            "load": {"cv2": cv2},
            "parameters": {"total": 1 if kind == OURS else 4},
        }
        return Result(kind, seed, config, summary)

    theirs = [result(STRONG, 0, 4.1, 0.8), result(STRONG, 1, 4.0, 0.2)]
    table = rows(
        [result(OURS, 0, 4.0, 0.1, "moe.top_clusters=1"), result(OURS, 1, 4.2, 0.1, "moe.top_clusters=1"), *theirs]
    )
    found = {verdict.claim.figure: verdict for verdict in verdicts(table, OURS)}
    assert found["loss"].values == pytest.approx((-0.1, 0.2))
    assert not found["loss"].reached
    assert found["parameters"].values == pytest.approx((-0.75, -0.75))
    assert not found["parameters"].reached
    assert found["load_cv2"].values == pytest.approx((8, 2))
    assert found["load_cv2"].reached  # five on average
    assert str(found["load_cv2"]).endswith("5.00 (2.00 to 8.00): reached on average, not in every seed")
    assert verdicts(table, "dense") == []
    twice = rows([result(OURS, 0, 4.0, 0.1), *theirs])  # m = 2: its loads are the mean of twice as many copies
    assert "load_cv2" not in {verdict.claim.figure for verdict in verdicts(twice, OURS)}


def test_work_of_a_layer_by_hand() -> None:
    """Two matrices of 128 x 256 and one of 256 x 128 in two experts; beside clusters 128 x 384, for every token."""
    standard, shared = (
        load_config(CONFIGS / "experiment" / f"quality-{name}.yaml") for name in ("standard-aux", "shared")
    )
    assert active_work(standard) == 2 * 2 * 3 * 128 * 256
    thin = 2 * 3 * (8 * 128 + 2 * 256)  # rank 1: U of all experts of a cluster, V of the two chosen
    assert active_work(shared) == pytest.approx(2 * 3 * 128 * (256 + 384) + thin + 2 * 128 * 8)


def test_the_paper_brings_its_baselines() -> None:
    assert [kind.name for kind in chosen_kinds(["paper"])] == ["dense", CLASSIC, STRONG, "paper"]
    assert [kind.name for kind in chosen_kinds(["clustered-cheap"])] == ["clustered-cheap"]
    assert [kind.name for kind in chosen_kinds([])] == list(KINDS)
    with pytest.raises(ConfigError, match="--kind none: use dense, standard-aux, "):
        chosen_kinds(["none"])


def test_progress_tells_by_what_has_been_measured() -> None:
    said: list[str] = []
    progress = StudyProgress({"training": 3, "evaluation": 1}, {"training": 600, "evaluation": 60}, said.append)
    assert progress.remaining() == "about 31 min left"
    progress.run("training", "dense", lambda: "done")
    assert said == ["1/4 training dense: done; about 60 s left"]  # it took no time


def test_a_cluster_gets_job_arrays_in_order(tmp_path: Path, started: list[str]) -> None:
    plan, said = _plan(tmp_path), list[str]()
    write_arrays(plan, 2, said.append)
    assert said[0] == f"sbatch --nodes=2 --ntasks-per-node=1 {tmp_path / 'grid-study-2.sbatch'}"
    write_arrays(plan, 2, said.append, gpus=True)
    assert said[2] == f"sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 {tmp_path / 'grid-study-2.sbatch'}"
    assert "--array=0-11%1" in (tmp_path / "grid-study-2.sbatch").read_text()
    run.reproduce(_plan(tmp_path, kinds=("dense", CLASSIC, STRONG, OURS)), lambda line: None)
    said.clear()
    write_arrays(plan, 2, said.append)
    assert [Path(line.split()[-1]).name for line in said[:-1]] == ["train-study-2.sbatch", "evaluate.sbatch"]
    script = (tmp_path / "evaluate.sbatch").read_text()
    assert "--array=0-1%1" in script  # dense, both seeds
    assert '-m moe_dist eval "${words[@]}"' in script


@pytest.mark.parametrize("nodes", [3, 32])
def test_nodes_that_do_not_divide_the_ranks_are_refused(tmp_path: Path, nodes: int) -> None:
    plan, said = _plan(tmp_path / "new", "paper"), list[str]()
    wanted = f"--nodes {nodes} does not divide the 16 ranks of --scale paper"
    with pytest.raises(ConfigError, match=wanted):
        write_arrays(plan, nodes, said.append)
    with pytest.raises(ConfigError, match=wanted):
        show_cost(plan, "h100", nodes, Console(quiet=True))
    assert (said, (tmp_path / "new").exists()) == ([], False)
