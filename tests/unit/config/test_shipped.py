"""Every configuration file that the project ships loads, and some number of ranks can run it."""

from pathlib import Path
from typing import get_args

import pytest

from moe_dist.config import MoEConfig, WorldShape, load_config, resolve_batch, resolve_world
from moe_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


def fits(path: Path, ranks: int) -> bool:
    config = load_config(path)
    try:
        resolve_world(config, ranks)
        resolve_batch(config, ranks)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_loads_and_fits_some_number_of_ranks(path: Path) -> None:
    assert any(fits(path, ranks) for ranks in (1, 2, 4, 8, 16, 32, 64))


@pytest.mark.parametrize(("ranks", "data", "cluster"), [(1, 1, 1), (2, 1, 2), (4, 1, 4), (8, 1, 8)])
def test_the_demo_runs_on_any_usual_number_of_ranks(ranks: int, data: int, cluster: int) -> None:
    config = load_config(ROOT / "configs" / "experiment" / "demo.yaml")
    assert (config.moe.experts, config.moe.clusters, config.moe.top_k) == (64, 8, 2)
    assert resolve_world(config, ranks) == WorldShape(data, cluster, 1)
    resolve_batch(config, ranks)


def test_every_kind_of_layer_has_a_description_and_a_module() -> None:
    from moe_dist.config.layer_kinds import LAYER_KINDS as DESCRIPTIONS
    from moe_dist.moe.layer_kinds import LAYER_KINDS as MODULES
    from moe_dist.moe.load_balancing import BALANCERS

    allowed = {name: field.annotation for name, field in MoEConfig.model_fields.items()}
    assert set(DESCRIPTIONS) == set(MODULES) == set(get_args(allowed["kind"]))
    assert set(BALANCERS) == set(get_args(allowed["balance"]))


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_the_paper_and_its_miniature_have_every_part_on(name: str) -> None:
    config = load_config(ROOT / "configs" / "experiment" / f"{name}.yaml")
    assert config.moe.layer_kind.clustered
    assert config.recluster.period is not None
    assert config.recluster.similarity == "fused"
    assert 0 < config.recluster.alpha < 1
    assert config.recluster.router_weight > 0
    assert (config.precision.residuals, config.precision.bits) == ("post", 4)
    assert config.memory.offload
    assert config.memory.device_budget_ratio < 1


@pytest.mark.parametrize("kind", ["clustered", "standard", "dense"])
def test_the_demo_can_be_compared_with_other_kinds_of_layer(kind: str) -> None:
    demo = load_config(ROOT / "configs" / "experiment" / "demo.yaml")
    other = demo.of_kind(kind, steps=5, warmup_steps=0)
    assert (other.moe.kind, other.train.steps, other.recluster.period) == (kind, 5, None)
    assert other.memory.offload == (kind == "clustered")
    assert demo.of_kind("clustered").recluster == demo.recluster
