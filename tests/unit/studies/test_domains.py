"""Which domain an expert serves, on counts whose answer is known, and once on a model that was really trained."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moe_dist.studies import domains

CONFIGS = Path(__file__).parents[3] / "configs"


def _counts(dominant_LE: np.ndarray, noise: int = 1) -> np.ndarray:
    layers, experts = dominant_LE.shape
    count_DLE = np.full((4, layers, experts), noise)
    for layer in range(layers):
        count_DLE[dominant_LE[layer], layer, np.arange(experts)] += 10
    return count_DLE


def test_planted_domains_are_found() -> None:
    cluster_LE = np.repeat(np.arange(4), 4)[None]
    renamed_LE = np.array([2, 0, 3, 1])[cluster_LE]
    assert domains.domain_index(_counts(renamed_LE), cluster_LE) == 1
    assert domains.domain_index(_counts(np.tile(np.arange(4), 4)[None]), cluster_LE) < 0
    assert domains.domain_purity(_counts(renamed_LE, noise=0)) == pytest.approx(1)


def test_a_domain_of_more_tokens_does_not_win_by_that() -> None:
    cluster_LE = np.repeat(np.arange(4), 4)[None]
    count_DLE = _counts(cluster_LE)
    count_DLE[0] *= 100
    assert domains.domain_index(count_DLE, cluster_LE) == 1
    np.testing.assert_allclose(domains.domain_share(count_DLE).sum(axis=0), 1)


def test_the_index_is_a_mean_over_layers() -> None:
    cluster_LE = np.stack([np.repeat(np.arange(4), 4)] * 2)
    dominant_LE = np.stack([cluster_LE[0], np.zeros(16, dtype=int)])
    assert domains.domain_index(_counts(dominant_LE), cluster_LE) == pytest.approx(0.5)


def test_a_trained_run_is_routed_and_counted(tmp_path: Path) -> None:
    english = tmp_path / "english.txt"
    english.write_text("\n\n".join(f"The {n}th line tells of number {n * n}." for n in range(5_000)))
    configs = tmp_path / "configs"
    configs.mkdir()
    for recipe, more in (("cheap", ""), ("regrouped", "recluster: {period: 2, start: 2, threshold: 0.0}\n")):
        text = f"include: [{CONFIGS / 'test' / 'smoke.yaml'}]\nname: {recipe}\n{more}"
        (configs / f"quality-{recipe}.yaml").write_text(text)
    spec = domains.DomainSpec(
        configs, tmp_path / "runs", ("cheap", "regrouped"), seeds=1, characters=40_000, english=english
    )
    runs = domains.run_domains(spec, print)
    assert [run.recipe for run in runs] == ["cheap", "regrouped"]
    assert all(-1 <= run.index <= 1 and 0.25 <= run.purity <= 1 and run.loss > 0 for run in runs)
    held = {path.stem: path for path in sorted((tmp_path / "runs" / "text").glob("validation-*.jsonl"))}
    (run,) = (tmp_path / "runs" / "runs").glob("*cheap*")
    count_DLE, cluster_LE = domains.domain_counts(run, held)
    assert count_DLE.shape == (4, 2, 16)
    per_layer_DL = count_DLE.sum(axis=2)
    assert (per_layer_DL[:, 0] == per_layer_DL[:, 1]).all()
    assert (per_layer_DL % (2 * 32) == 0).all()  # k=2, sequences of 32
    assert [np.bincount(row).tolist() for row in cluster_LE] == [[4, 4, 4, 4]] * 2
    domains.render(runs, Console(file=(tmp_path / "table.txt").open("w"), width=150))
    assert "regrouped" in (tmp_path / "table.txt").read_text()
    json.dumps([vars(run) for run in runs])
