"""Damaged input that once ended in a traceback or a hang: each gives a value or one line now."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import ConfigError, DataError, LaunchError
from moe_dist.launch.environment import discover
from moe_dist.launch.hostfile import read_hostfile
from moe_dist.report import read_runs
from moe_dist.report.maps import load_counts
from moe_dist.simulator.calibration import Case, read_case
from moe_dist.simulator.popularity import recorded

SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    assert str(DataError("columns: a\nb, c\u2028d")) == "columns: a b, c d"


def test_a_task_list_of_billions_of_nodes_is_not_expanded() -> None:
    place = discover({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x999999999999)"})
    assert (place.rank, place.local_world_size) == (5, 4)
    with pytest.raises(LaunchError, match=r"does not say how many tasks SLURM_NODEID=1 runs"):
        discover({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4,"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_numbers_of_thousands_of_digits_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=rf"^{name}='9{{60}}\.\.\.' is not a whole number"):
        discover({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", name: "9" * 5000})
    (tmp_path / "hosts").write_text(f"node slots={'9' * 5000}\n")
    with pytest.raises(LaunchError, match="line 1"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize("text", ["date: 2024-99-99\n", "x: !!float y\n", "x: !!int 0b2\n"])
def test_a_report_lists_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (run,) = read_runs([tmp_path])
    assert run.config == {}
    assert "config.yaml: is not valid YAML" in run.problems


def test_a_count_beyond_a_float_is_left_out_of_the_load_map() -> None:
    assert load_counts([{"step": 1, "experts": [[10**400]]}])[0] == []


@pytest.mark.parametrize("line", ['{"experts": [[1' + "0" * 400 + "]]}", "[" * 100_000])
def test_a_damaged_line_of_a_trace_is_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / "load.jsonl").write_text(line + '\n{"experts": [[1, 3]]}\n')
    assert recorded(tmp_path, 2)[0].tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("array", [np.array([[0.5]]), np.array([[2**62]]), np.array([["a"]]), np.array([[-5]])])
def test_a_routing_of_no_choices_is_refused(tmp_path: Path, array: Any) -> None:
    for name in ("layer0.flat", "layer0.one"):
        np.savez(tmp_path / "routing.npz", **{name: array})
        if array.dtype.kind != "i" or array.max() > 0 or name.endswith(".one"):
            with pytest.raises(ConfigError, match="nor routing"):
                recorded(tmp_path, 4)


def test_a_routing_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "routing.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ConfigError, match="nor routing"):
        recorded(tmp_path, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"world": {"data": "1", "cluster": 2, "shard": 1}},
        {"world": {"data": 0, "cluster": 2, "shard": 1}},
        {"node_of_rank": []},
        {"timed_seconds": [float("nan")]},
        {"timed_seconds": [10**400]},
    ],
)
def test_a_measurement_of_no_ranks_or_times_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "config.yaml").write_text("moe: {kind: dense}\n")
    figures = {"world": {"data": 1, "cluster": 2, "shard": 1}, "node_of_rank": [0, 1], "timed_seconds": [0.5], **change}
    (tmp_path / "traffic.json").write_text(json.dumps(figures))
    with pytest.raises(ConfigError, match=r"is no folder of|needs timed steps"):
        read_case(Case(run=tmp_path))
