"""`moe-dist calibrate`: fit of the simulator's constants to measured steps, and prediction of held-out steps.

Each case is a folder written by `moe-dist measure traffic`: its configuration, ranks, routing and timed steps. The one
model of a step is `step_time`, which `simulate` and `plan` use. The fit minimizes the squared logarithms of predicted
over measured over the cases that are not held out. A weak prior (`PULL`) keeps a constant that the cases do not
determine at its initial value.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.optimize import least_squares

from moe_dist.config import RunConfig, Section, WorldShape, load_config, resolve_batch
from moe_dist.config.yaml_text import shortened
from moe_dist.errors import ConfigError
from moe_dist.simulator.machine import Machine, Positive, read_section
from moe_dist.simulator.popularity import Floats, recorded
from moe_dist.simulator.step_time import Scenario, StepTime, step_time
from moe_dist.simulator.strategies import Strategy

PULL = 0.02
"""Weight of the logarithm of a constant over its initial value, beside a case's relative error."""
SHARES = ("matmul_share", "expert_share", "link_share")
DEVICE_CONSTANTS = (*SHARES, "memory_bandwidth", "stack_bandwidth", "step_overhead")


class Case(Section):
    """One measurement in the file of cases."""

    run: Path = Field(description="folder of `moe-dist measure traffic`, seen from the file with the cases")
    network_bandwidth: Positive | None = Field(None, description="bytes/s of an interface; null: the machine's")
    held_out: bool = Field(False, description="predicted, but nothing is fitted to it")


class Cases(Section):
    """File of cases that `moe-dist calibrate` reads."""

    machine: Machine = Field(description="constants to start from")
    cases: Annotated[tuple[Case, ...], Field(min_length=2)]


@dataclass(frozen=True)
class Measured:
    """Measured case.

    Attributes:
        seconds: time of every timed step.
        popularity_LE: share of each expert in each layer, from the recorded routing.
    """

    case: Case
    config: RunConfig
    shape: WorldShape
    nodes: int
    seconds: tuple[float, ...]
    popularity_LE: Floats

    @property
    def median(self) -> float:
        """Return the median seconds of a timed step."""
        return float(np.median(self.seconds))

    def predict(self, machine: Machine) -> StepTime:
        """Predict its step on a machine."""
        fabric = machine.fabric(
            self.nodes, self.shape.ranks // self.nodes, network_bandwidth=self.case.network_bandwidth
        )
        strategy = Strategy.TWO_STAGE if self.config.moe.layer_kind.clustered else Strategy.FLAT
        batch = resolve_batch(self.config, self.shape.ranks)
        vocabulary = self.config.tokenizer.vocab_size
        return step_time(self.config, self.shape, batch, vocabulary, fabric, self.popularity_LE, Scenario(strategy))


@dataclass(frozen=True)
class Prediction:
    """Case with its prediction."""

    measured: Measured
    time: StepTime

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.time.seconds / self.measured.median - 1


@dataclass(frozen=True)
class Calibration:
    """Fitted machine, with all cases on it."""

    machine: Machine
    predictions: tuple[Prediction, ...]

    def mean_error(self, held_out: bool | None = None) -> float | None:
        """Return the mean absolute relative error of all, held-out or fitted cases; None without any."""
        wanted = [one for one in self.predictions if held_out in (None, one.measured.case.held_out)]
        return float(np.mean([abs(one.error) for one in wanted])) if wanted else None


def calibrate(file: Path) -> Calibration:
    """Fit the machine of a file with cases, and predict them all.

    Raises:
        ConfigError: the file or a case cannot be read, or no case is left to fit to.
    """
    asked = read_section(file, Cases, "cases")
    measured = [read_case(case.model_copy(update={"run": file.parent / case.run})) for case in asked.cases]
    fitted_on = [one for one in measured if not one.case.held_out]
    if not fitted_on:
        raise ConfigError(f"cases {file}: all are held out: leave some to fit to")
    machine = fit(asked.machine, fitted_on)
    return Calibration(machine, tuple(Prediction(one, one.predict(machine)) for one in measured))


def read_case(case: Case) -> Measured:
    """Read a measurement's folder.

    Raises:
        ConfigError: it is not the folder of a measurement, or is incomplete.
    """
    config = load_config(case.run / "config.yaml")
    try:
        figures = json.loads((case.run / "traffic.json").read_text(encoding="utf-8"))
        seconds = tuple(map(float, figures["timed_seconds"]))
        shape, nodes = WorldShape(**figures["world"]), len(set(figures["node_of_rank"]))
        sizes = [size for axis, size in asdict(shape).items() if axis != "sliced"]
        if type(shape.sliced) is not bool or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"world={figures['world']} must be whole numbers of 1 or more")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        why = shortened(f"{type(error).__name__}: {error}", 300)
        raise ConfigError(f"case {case.run}: is no folder of `moe-dist measure traffic`: {why}") from error
    if not seconds or not all(0 < one < inf for one in seconds) or not nodes or shape.ranks % nodes:
        raise ConfigError(f"case {case.run}: needs timed steps, and nodes of as many ranks each")
    popularity_LE = np.ones((1, 1)) if not config.moe.layer_kind.routed else recorded(case.run, config.moe.experts)
    return Measured(case, config, shape, nodes, seconds, popularity_LE)


def fit(start: Machine, measured: Sequence[Measured]) -> Machine:
    """Return the machine whose predictions are closest to the medians of measured steps."""
    first = np.log(_constants(start))

    def errors(logs: npt.NDArray[np.float64]) -> Floats:
        machine = _with_constants(start, np.exp(logs))
        missed = [np.log(one.predict(machine).seconds / one.median) for one in measured]
        return np.array([*missed, *(PULL * (logs - first))])

    most = np.array([0.0 if name in SHARES else np.inf for name in (*DEVICE_CONSTANTS, "network_latency")])
    start_at = np.minimum(first, most - 1e-3)  # inside the bounds: no share of a rate exceeds 1
    options = {"diff_step": 1e-3, "loss": "soft_l1", "f_scale": 0.1, "xtol": 1e-4, "ftol": 1e-4}
    found = least_squares(errors, start_at, bounds=(-np.inf, most), **options)
    return _with_constants(start, np.exp(found.x))


def _constants(machine: Machine) -> Floats:
    """Return the fitted constants in the order of `DEVICE_CONSTANTS`, the network's latency last."""
    device = machine.device
    start = {"expert_share": device.matmul_share, "stack_bandwidth": device.network_bandwidth, "step_overhead": 1e-2}
    found = [getattr(device, name) or start[name] for name in DEVICE_CONSTANTS]
    return np.array([*found, machine.network_latency])


def _with_constants(machine: Machine, values: Floats) -> Machine:
    *of_device, latency = map(float, values)
    fitted: dict[str, Any] = dict(zip(DEVICE_CONSTANTS, of_device, strict=True))
    device = replace(machine.device, **fitted)
    return machine.model_copy(update={"device": device, "network_latency": latency})


def to_dict(found: Calibration) -> dict[str, Any]:
    """Return all figures for JSON."""
    return {
        "machine": found.machine.model_dump(mode="json"),
        "mean_absolute_error": found.mean_error(),
        "mean_absolute_error_held_out": found.mean_error(held_out=True),
        "cases": [_case_to_dict(one) for one in found.predictions],
    }


def _case_to_dict(one: Prediction) -> dict[str, Any]:
    measured = one.measured
    return {
        "case": measured.case.run.name,
        "kind": measured.config.moe.kind,
        "world": asdict(measured.shape),
        "nodes": measured.nodes,
        "network_bandwidth": measured.case.network_bandwidth,
        "held_out": measured.case.held_out,
        "measured_seconds": measured.seconds,
        "measured_median": measured.median,
        "predicted_seconds": one.time.seconds,
        "predicted_parts": one.time.parts,
        "error": one.error,
    }
