"""The quality comparison: its table, its resumption, its failures; real training is tested elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_dist.benchmarks.subruns import source_digest
from moe_dist.config import load_config
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.studies import quality

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
    assert [cell.name for cell in found[:2]] == ["dense-stdlib-0", "standard-aux-stdlib-0"]
    assert len({cell.result_file(Path()) for cell in found}) == len(found) == 2 * len(quality.RECIPES)
    configs = [load_config(cell.config, cell.overrides) for cell in found if cell.seed == 0]
    assert len({config.moe.model_dump_json() for config in configs}) == len(quality.RECIPES)
    assert len({config.model_dump_json(exclude={"moe", "name", "optimizer"}) for config in configs}) == 1


def test_other_code_has_other_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = quality.cells(CONFIGS, CORPORA, 1, ["good"], ())
    before = cell.result_file(tmp_path)
    assert cell.result_file(tmp_path) == before
    monkeypatch.setattr(quality, "PACKAGE", tmp_path)
    assert cell.result_file(tmp_path) != before
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

    def fake(cell: quality.QualityCell, file: Path, folder: Path) -> str | None:
        trained.append(cell.name)
        if cell.recipe == "dense":
            return "out of luck"
        file.write_text(json.dumps(_summary(4.0)))
        return None

    monkeypatch.setattr(quality, "_train", fake)
    todo = quality.cells(CONFIGS, CORPORA, 1, ("dense", "good"), ())
    said: list[str] = []
    results = quality.run_cells(todo, tmp_path, 2, said.append)
    assert [cell.recipe for cell in results] == ["good"]
    assert any("dense-stdlib-0: failed: out of luck" in line for line in said)
    with pytest.raises(MoeDistError, match="dense-stdlib-0"):
        quality.require_all(results, todo)
    quality.run_cells(todo, tmp_path, 1, said.append)
    assert sorted(trained) == ["dense-stdlib-0", "dense-stdlib-0", "good-stdlib-0"]


def test_rows_compare_seed_by_seed_with_the_yardstick() -> None:
    def cell(recipe: str, seed: int) -> quality.QualityCell:
        return quality.QualityCell(recipe, "stdlib", seed, CONFIGS / "quality.yaml", ())

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
    shown = console.export_text()
    assert "4.3750 ± 1.2374 │    5.2625 │ -0.125 (-0.500 to +0.250) │" in shown
    assert "200 │   1,500 │" in shown
    assert json.loads(json.dumps(quality.to_dict(results)))["rows"][-1]["difference"]["standard-aux"]
