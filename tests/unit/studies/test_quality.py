"""The quality comparison: its table, its resumption, its failures; real training is tested elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_dist.benchmarks import subruns
from moe_dist.benchmarks.subruns import result_file, source_digest
from moe_dist.config import load_config
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.studies import quality
from moe_dist.studies.runner import StudyCell, require_all, run_cells, validation_loss

CONFIGS = Path(__file__).parents[3] / "configs" / "experiment"
CORPORA = {"stdlib": ("corpus.kind=stdlib",)}


def _summary(loss: float, expert: int = 20) -> dict[str, Any]:
    return {
        "validation": {"loss": loss},
        "parameters": {"expert": expert, "expert_standard": 100 if expert else 0},
        "load": {"variance": 0.5 if expert else None},
        "steps": 200,
        "seconds": 1500.0,
    }


def test_every_recipe_is_shipped_and_only_what_it_should_differs() -> None:
    found = quality.cells(CONFIGS, CORPORA, 2, quality.RECIPES, ())
    assert [cell.name for cell in found[:2]] == ["recipe-dense_corpus-stdlib_0", "recipe-standard-aux_corpus-stdlib_0"]
    assert len({cell.result_file(Path()) for cell in found}) == len(found) == 2 * len(quality.RECIPES)
    configs = [load_config(cell.config, cell.overrides) for cell in found if cell.repeat == 0]
    assert len({config.moe.model_dump_json() for config in configs}) == len(quality.RECIPES)
    assert len({config.model_dump_json(exclude={"moe", "name", "optimizer"}) for config in configs}) == 1


def test_other_code_has_other_results(tmp_path: Path) -> None:
    (cell,) = quality.cells(CONFIGS, CORPORA, 1, ["good"], ())
    before = cell.result_file(tmp_path)
    assert cell.result_file(tmp_path) == before
    assert result_file(tmp_path, "good", cell.load(), package=tmp_path) != result_file(tmp_path, "good", cell.load())
    digests = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.c", "2"), ("notes.txt", "3")):
        (tmp_path / name).write_text(text)
        source_digest.cache_clear()
        digests.add(source_digest(tmp_path))
    assert len(digests) == 3  # only sources count


def test_an_unknown_recipe_names_its_file() -> None:
    with pytest.raises(ConfigError, match=r"quality-magic\.yaml"):
        quality.cells(CONFIGS, CORPORA, 1, ["magic"], ())


def test_finished_cells_are_read_and_failed_ones_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def fake(command: list[str], seconds: float | None = None) -> str | None:
        target = Path(command[-1])
        trained.append(target.name)
        if "dense" in target.name:
            return "out of luck"
        target.write_text(json.dumps(_summary(4.0)))
        return None

    monkeypatch.setattr(subruns, "run", fake)
    todo = quality.cells(CONFIGS, CORPORA, 1, ("dense", "good"), ())
    said: list[str] = []
    outcomes = run_cells(todo, tmp_path, said.append, validation_loss, jobs=2)
    assert [outcome.cell.value("recipe") for outcome in outcomes if outcome.summary] == ["good"]
    assert any("recipe-dense_corpus-stdlib_0: no result: out of luck" in line for line in said)
    with pytest.raises(MoeDistError, match="recipe-dense_corpus-stdlib_0"):
        require_all(outcomes)
    run_cells(todo, tmp_path, said.append, validation_loss)
    assert sorted("dense" in name for name in trained) == [False, True, True]


def test_rows_compare_seed_by_seed_with_the_baseline() -> None:
    def cell(recipe: str, seed: int) -> StudyCell:
        return StudyCell((("recipe", recipe), ("corpus", "stdlib")), 1, seed, CONFIGS / "quality.yaml", ())

    results = {
        cell("standard-aux", 0): _summary(4.0, 100),
        cell("standard-aux", 1): _summary(5.0, 100),
        cell("good", 0): _summary(3.5),
        cell("good", 1): _summary(5.25),
        cell("dense", 0): _summary(6.0, 0),
    }
    results[cell("good", 1)]["validation"]["loss_stored"] = 5.2625
    table = quality.rows(results)
    good = next(row for row in table if row.recipe == "good")
    dense = next(row for row in table if row.recipe == "dense")
    assert quality.differences(table, good, "standard-aux") == [-0.5, 0.25]
    assert quality.differences(table, good, "standard-bias") == []
    assert (good.expert_share, good.load_variance) == (0.2, 0.5)
    assert good.spread == pytest.approx(1.2374, abs=1e-4)
    assert (dense.expert_share, dense.load_variance, dense.spread) == (None, None, 0.0)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    quality.render(results, console)
    assert good.stored == {1: 5.2625}
    assert dense.stored == {}
    shown = " ".join(console.export_text().split())
    assert "4.3750 ± 1.2374 5.2625 -0.125 (-0.500 to +0.250) " in shown
    assert " 200 1,500 " in shown
    assert json.loads(json.dumps(quality.to_dict(results)))["rows"][-1]["difference"]["standard-aux"]
