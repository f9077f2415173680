"""Fitting the simulator: steps made with known constants are found again, and what cannot be read is refused."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_dist.cli import app
from moe_dist.config import dump_config, load_config
from moe_dist.errors import ConfigError
from moe_dist.simulator.calibration import Case, Cases, calibrate, fit, read_case
from moe_dist.simulator.machine import Machine, read_section

DEVICE = {
    "name": "core",
    "flops": 1e11,
    "memory": 8e9,
    "memory_bandwidth": 1e10,
    "node_bandwidth": 1e11,
    "network_bandwidth": 1e11,
    "host_bandwidth": 1e10,
    "matmul_share": 0.2,
    "stack_bandwidth": 5e8,
    "reserved": 0,
}
START = Machine.model_validate({"device": DEVICE, "rails": 1, "cores": 2, "network_latency": 5e-4})
TRUE = START.model_copy(
    update={
        "device": replace(
            START.device, matmul_share=0.4, expert_share=0.3, step_overhead=0.03, link_share=0.9, stack_bandwidth=2e8
        ),
        "network_latency": 1e-3,
    }
)
RATES = (25e6, 125e6, None)


def _folder(root: Path, kind: str, nodes: int, seconds: list[float]) -> Path:
    """What `measure traffic` leaves, with its choices drawn at random."""
    folder = root / f"{kind}-{nodes}-{len(list(root.iterdir()))}"
    folder.mkdir()
    words = ["model.sequence_length=128", "train.precision=float32", f"moe.kind={kind}"]
    (folder / "config.yaml").write_text(dump_config(load_config(None, words)))
    world = {"data": 1, "cluster": nodes, "shard": 1}
    figures = {"world": world, "node_of_rank": list(range(nodes)), "timed_seconds": seconds}
    (folder / "traffic.json").write_text(json.dumps(figures))
    stage, most, top = ("one", 4, 1) if kind == "clustered" else ("flat", 32, 2)
    choices: dict[str, Any] = {
        f"layer{i}.{stage}": np.random.default_rng(i).integers(most, size=(512, top)) for i in (0, 1)
    }
    np.savez(folder / "routing.npz", **choices)
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases of three rates, two sizes and both kinds, whose median step the simulator makes with the true constants."""
    root = tmp_path_factory.mktemp("cases")
    (root / "runs").mkdir()
    found = []
    for kind, nodes, rate in itertools.product(("clustered", "standard"), (2, 4), RATES):
        case = Case(run=_folder(root / "runs", kind, nodes, [1.0]), network_bandwidth=rate)
        true = read_case(case).predict(TRUE).seconds
        figures = case.run / "traffic.json"
        figures.write_text(figures.read_text().replace("[1.0]", str([1.3 * true, true, 0.9 * true])))
        found.append({"run": f"runs/{case.run.name}", "network_bandwidth": rate, "held_out": rate == RATES[1]})
    (root / "cases.json").write_text(json.dumps({"machine": START.model_dump(mode="json"), "cases": found}))
    return root / "cases.json"


def test_the_command_finds_constants_that_predict_what_was_held_out(cases: Path, tmp_path: Path) -> None:
    machine, figures, told = tmp_path / "machine.json", tmp_path / "figures.json", tmp_path / "told.json"
    ran = CliRunner().invoke(app, ["calibrate", str(cases), "-o", str(machine), "--json", str(figures)])
    assert ran.exit_code == 0, ran.output
    assert "mean absolute error of those held out" in ran.output
    found = json.loads(figures.read_text())
    assert len(found["cases"]) == 12
    assert [case["held_out"] for case in found["cases"]] == 4 * [False, True, False]
    asked = read_section(cases, Cases, "cases")
    measured = [read_case(case.model_copy(update={"run": cases.parent / case.run})) for case in asked.cases]
    assert max(abs(one.predict(START).seconds / one.median - 1) for one in measured) > 0.3
    assert found["mean_absolute_error_held_out"] < 0.03
    assert found["mean_absolute_error"] < 0.03
    assert found["machine"]["device"]["expert_share"] == pytest.approx(0.3, rel=0.15)
    assert found["machine"]["device"]["link_share"] == pytest.approx(0.9, rel=0.05)

    words = ["--nodes=4", "--gpus-per-node=1", f"--calibration={machine}", f"--json={told}"]
    ran = CliRunner().invoke(app, ["simulate", "configs/experiment/demo.yaml", *words])
    assert ran.exit_code == 0, ran.output
    seconds = {name: time["seconds"] for name, time in json.loads(told.read_text()).items()}
    assert 0.1 < seconds["two-stage"] < seconds["flat"] < 100  # a core's seconds, no GPU's


def test_a_constant_that_no_case_tells_of_stays(cases: Path) -> None:
    asked = read_section(cases, Cases, "cases")
    slow = [case for case in asked.cases if case.network_bandwidth == RATES[0]][:2]
    machine = fit(START, [read_case(case.model_copy(update={"run": cases.parent / case.run})) for case in slow])
    assert machine.device.stack_bandwidth == pytest.approx(5e8, rel=0.01)  # processors move data far faster than cables


def test_what_cannot_be_read_is_named(cases: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    for text, message in [
        ("{", "Invalid JSON"),
        ('{"machine": {"device": "h1000"}, "cases": []}', "h1000"),
        ('{"machine": {"device": "h100"}, "cases": [{"run": "a", "rate": 1}, {"run": "b"}]}', r"cases\.0\.rate"),
        (
            '{"machine": {"device": {"name": "x", "flop": 1}}, "cases": []}',
            r"machine\.device: .*'flop' is no field of a device",
        ),
    ]:
        broken.write_text(text)
        with pytest.raises(ConfigError, match=rf"^cases .*broken\.json: .*{message}"):
            calibrate(broken)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_section(tmp_path / "none", Cases, "cases")
    folder = _folder(tmp_path, "standard", 2, [1.0])
    (folder / "traffic.json").write_text('{"world": ')
    with pytest.raises(ConfigError, match=r"^case .*: is no folder of `moe-dist measure traffic`"):
        read_case(Case(run=folder))
    tree = json.loads(cases.read_text())
    for case in tree["cases"]:
        case["held_out"] = True
        case["run"] = str(cases.parent / case["run"])
    broken.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="all are held out: leave some to fit to"):
        calibrate(broken)
