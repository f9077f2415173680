"""The backend that is measured as the fastest is taken, and the first measurement stays."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_dist.config import load_config
from moe_dist.kernels import backend_choice as module
from moe_dist.kernels.backend_choice import BackendShape, BackendTimes, measure_backends

CPU = torch.device("cpu")
SHAPE = BackendShape(rows=40, top_k=2, experts=4, hidden=16, expert_hidden=32, rank=2, vectors=True, dtype="float32")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MOE_DIST_NATIVE", "0")  # masked and sorted alone
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    return tmp_path / "moe-dist" / "backends"


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ({"cpu": 1.0, "masked": 1.2}, "cpu"),
        ({"cpu": 1.0, "masked": 0.9}, "masked"),
        ({"cpu": 1.0, "masked": 0.98}, "cpu"),  # too little to give up the default
        ({}, "cpu"),
    ],
)
def test_the_fastest_is_taken(seconds: dict[str, float], fastest: str) -> None:
    assert BackendTimes(seconds, "cpu").fastest == fastest


def test_the_choice_is_shown_with_the_speed_of_the_others() -> None:
    times = BackendTimes({"cpu": 2.0, "masked": 3.0, "sorted": 2.5}, "cpu")
    assert str(times) == "cpu: 1.50 times as fast as masked, 1.25 times as sorted"
    assert str(BackendTimes({"masked": 3.0}, "masked")) == "masked (no other was available)"
    assert str(BackendTimes({}, "cpu")) == "cpu (not measured)"


def test_every_available_backend_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_backends(SHAPE, CPU)
    assert set(found.seconds) == {"masked", "sorted"}
    assert all(taken > 0 for taken in found.seconds.values())
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == found.seconds
    monkeypatch.setattr(module, "_time", lambda *_: pytest.fail("measured again"))
    assert measure_backends(SHAPE, CPU) == found


def test_tritons_interpreter_is_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_backends", lambda *_: ["masked", "sorted", "triton"])
    assert set(measure_backends(SHAPE, CPU).seconds) == {"masked", "sorted"}


def test_the_first_measurement_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def while_another_process_finishes(*_: object) -> dict[str, float]:
        if not list(cache.iterdir()):
            monkeypatch.setattr(module, "_time", lambda *_: {"masked": 1.0, "sorted": 5.0})
            measure_backends(SHAPE, CPU)
        return {"masked": 7.0, "sorted": 2.0}

    monkeypatch.setattr(module, "_time", while_another_process_finishes)
    assert measure_backends(SHAPE, CPU).seconds == {"masked": 1.0, "sorted": 5.0}
    assert len(list(cache.iterdir())) == 1  # no partial file is left


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"masked": "fast", "sorted": 1.0}', '{"masked": 1.0}'])
def test_a_damaged_file_is_measured_again(cache: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_backends(SHAPE, CPU)
    (file,) = cache.iterdir()
    file.write_text(text)
    monkeypatch.setattr(module, "_time", lambda *_: {"masked": 1.0, "sorted": 0.5})
    assert measure_backends(SHAPE, CPU).fastest == "sorted"


def test_other_shapes_are_measured_apart_and_small_ones_not_at_all(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_backends(SHAPE, CPU)
    measure_backends(replace(SHAPE, top_k=1), CPU)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(module, "LEAST_WORK", 6 * 40 * 16 * 32 + 1)
    assert measure_backends(replace(SHAPE, rank=1), CPU) == BackendTimes({}, "masked")
    assert len(list(cache.iterdir())) == 2


def test_without_a_cache_folder_the_choice_is_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    assert set(measure_backends(SHAPE, CPU).seconds) == {"masked", "sorted"}


def test_the_shape_of_a_layer() -> None:
    words = ["moe.experts=32", "moe.clusters=4", "moe.top_clusters=2", "moe.top_k=2", "moe.expert_hidden=64"]
    moe = load_config(None, [*words, "moe.rank=3"]).moe
    # 2 ranks of 1,000 tokens that go to 2 of 4 clusters each: 1,000 for a cluster; 8 experts on 2 shards
    wanted = BackendShape(1000, 2, 4, 48, 64, 3, True, "bfloat16")
    assert BackendShape.of(moe, 48, "bfloat16", 1000, ranks=2, shards=2) == wanted
    assert wanted.work == 3 * 2 * 1000 * 48 * 64
