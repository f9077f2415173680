"""`moe-dist bench offload`: bytes follow the active clusters only if updates are lazy."""

from pathlib import Path

import pytest

from moe_dist.benchmarks.offload import OffloadBenchCase, _measure, to_dict
from moe_dist.benchmarks.offload_spec import OffloadBenchSpec
from moe_dist.distributed.init import init_distributed
from moe_dist.errors import ConfigError
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.timeout(200)
SPEC = OffloadBenchSpec((1, 4), clusters=4, layers=1, hidden=32, expert_hidden=32, budget=0.6, steps=2)


def _cases(folder: Path) -> list[OffloadBenchCase]:
    configs = [SPEC.config(lazy, folder) for lazy in (True, False)]
    process = init_distributed(configs[0].world)
    return [_measure(config, active, SPEC, process) for config in configs for active in SPEC.active]


def test_bytes_follow_the_active_clusters_only_if_updates_are_lazy(tmp_path: Path) -> None:
    cases = run_ranks(_cases, 1, tmp_path)[0]
    lazy, all_lazy, eager, _ = cases
    assert [(case.lazy, case.active) for case in cases] == [(True, 1), (True, 4), (False, 1), (False, 4)]
    assert (lazy.bytes_per_step, lazy.deferred) == (0, 0.75)
    assert eager.bytes_per_step > 0 == eager.deferred
    assert all_lazy.bytes_per_step > 0
    assert to_dict(SPEC, cases)["cases"][0]["deferred"] == 0.75


def test_more_active_clusters_than_there_are_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each --active 1 to 4"):
        OffloadBenchSpec((5,), clusters=4).config(True, tmp_path)
