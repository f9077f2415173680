"""Run folders, checkpoints, exported files, calibrations and traces."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.exported import open_exported
from moe_dist.checkpoint.manifest import MANIFEST, _checksum, read_index, read_manifest
from moe_dist.checkpoint.store import check
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.report import read_runs
from moe_dist.report.maps import load_counts, membership_history
from moe_dist.report.page import page
from moe_dist.report.read import series
from moe_dist.simulator.calibration import Case, Cases, read_case
from moe_dist.simulator.machine import Machine, read_section
from moe_dist.simulator.popularity import recorded
from tests.fuzz.damage import bytes_like, encoded, fuzzed, json_bytes, reads, trees_like
from tests.unit.checkpoint.samples import saved
from tests.unit.report.example import write_run
from tests.unit.simulator.test_calibration import DEVICE

TEXTS = ("config.yaml", "metrics.jsonl", "load.jsonl", "events.jsonl")
OBJECTS = ("summary.json", "traffic.json", "profile.json")


@pytest.fixture(scope="module")
def run(scratch: Path) -> Path:
    return write_run(scratch / "run")


@pytest.fixture(scope="module")
def valid(run: Path) -> dict[str, bytes]:
    """Files of the valid run: lines are cut to a few, so that damage meets each kind."""
    files = {name: (run / name).read_bytes() for name in (*TEXTS, *OBJECTS)}
    return {
        name: b"".join(data.splitlines(keepends=True)[:6]) if name in TEXTS else data for name, data in files.items()
    }


@st.composite
def damaged_runs(draw: st.DrawFn, valid: dict[str, bytes]) -> dict[str, bytes]:
    """Return a run's files, of which one is damaged."""
    name = draw(st.sampled_from([*TEXTS, *OBJECTS]))
    if name == "config.yaml" or draw(st.integers(0, 3)) == 0:
        return {**valid, name: draw(bytes_like(valid[name], ["2024-99-99", "? [a]\n: b", "!!float x"]))}
    if name in OBJECTS:
        return {**valid, name: draw(json_bytes(json.loads(valid[name])))}
    lines = valid[name].splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = draw(
        st.one_of(json_bytes(json.loads(lines[number])), trees_like(json.loads(lines[number])).map(encoded))
    )
    return {**valid, name: b"\n".join(lines)}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != data:
            (folder / name).write_bytes(data)


@fuzzed()
@given(st.data())
def test_run_folder(run: Path, valid: dict[str, bytes], data: st.DataObject) -> None:
    _write(run, data.draw(damaged_runs(valid)))
    found = reads(lambda: read_runs([run]))
    assert found is not None
    (files,) = found
    assert files.status
    assert files.last_step >= 0
    for line_of, key in ((files.metrics, "train.loss"), (files.loads, "load.cv2")):
        x, y = series(line_of, "step", key)
        assert len(x) == len(y)
    assert all(len(problem.splitlines()) == 1 for problem in files.problems)
    load_counts(files.loads)
    membership_history(files.events)


@fuzzed(0.02)
@given(st.data())
def test_report_page(run: Path, valid: dict[str, bytes], data: st.DataObject) -> None:
    _write(run, data.draw(damaged_runs(valid)))
    assert page(read_runs([run])).startswith("<!DOCTYPE html>")


@pytest.fixture(scope="module")
def checkpoint(scratch: Path) -> Path:
    (folder,) = saved(scratch / "checkpoints", 3)
    return folder


@pytest.fixture(scope="module")
def manifest(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
    content["placements"] = [
        {"members": [[0, 1], [2, 3]], "block_of_cluster": [0, 1], "blocks": 2, "shards": 1, "version": 0}
    ]
    del content["checksum"]
    return content


def _signed(tree: Any) -> bytes:
    """Return a manifest whose checksum is right, as an enemy would."""
    return encoded({"checksum": _checksum(tree), **tree} if isinstance(tree, dict) else tree)


@fuzzed()
@given(st.data())
def test_manifest(checkpoint: Path, manifest: dict[str, Any], data: st.DataObject) -> None:
    signed = trees_like(manifest).map(_signed)
    (checkpoint / MANIFEST).write_bytes(data.draw(st.one_of(signed, signed, json_bytes(manifest))))
    if reads(lambda: read_manifest(checkpoint)) is not None:
        reads(lambda: check(checkpoint))
        reads(lambda: find_weights(checkpoint))


@pytest.fixture(scope="module")
def index(scratch: Path) -> tuple[Path, bytes]:
    (folder,) = saved(scratch / "indices", 3)
    return folder, (folder / "index.json").read_bytes()


@fuzzed()
@given(st.data())
def test_index(index: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, text = index
    (folder / "index.json").write_bytes(data.draw(json_bytes(json.loads(text))))
    reads(lambda: read_index(folder))


@pytest.fixture(scope="module")
def exported(scratch: Path) -> tuple[Path, bytes]:
    saved(scratch / "trained", 3)
    file = scratch / "exported.safetensors"
    export_weights(find_weights(scratch / "trained"), file)
    return file, file.read_bytes()


@st.composite
def damaged_exports(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return an exported file with a damaged header or with damaged bytes."""
    if draw(st.booleans()):
        return draw(bytes_like(valid))
    size = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + size])
    metadata = header["__metadata__"]
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted(metadata)))
        metadata[key] = draw(json_bytes(json.loads(metadata[key]) if key != "format" else "pt")).decode(
            errors="replace"
        )
        text = encoded(header)
    else:
        text = encoded(draw(trees_like(header)))
    return len(text).to_bytes(8, "little") + text + valid[8 + size :]


@fuzzed()
@given(st.data())
def test_exported_file(exported: tuple[Path, bytes], data: st.DataObject) -> None:
    file, valid = exported
    file.write_bytes(data.draw(damaged_exports(valid)))
    reads(lambda: find_weights(file))

    def values() -> int:
        with open_exported(file) as opened:
            return sum(opened.tensor(name).numel() for name in opened.names)

    reads(values)


CASES = {
    "machine": {"device": DEVICE, "rails": 1, "cores": 2, "network_latency": 5e-4},
    "cases": [{"run": "a", "network_bandwidth": 1e9}, {"run": "b", "held_out": True}],
}
FIGURES = {"world": {"data": 1, "cluster": 2, "shard": 1}, "node_of_rank": [0, 1], "timed_seconds": [0.5, 0.25]}


@fuzzed()
@given(json_bytes(CASES), json_bytes(CASES["machine"]))
def test_calibration(scratch: Path, cases: bytes, machine: bytes) -> None:
    for what, kind, data in (("cases", Cases, cases), ("machine", Machine, machine)):
        (scratch / what).write_bytes(data)
        reads(lambda what=what, kind=kind: read_section(scratch / what, kind, what))  # type: ignore[misc]


@pytest.fixture(scope="module")
def case(scratch: Path) -> Path:
    folder = scratch / "case"
    folder.mkdir()
    (folder / "config.yaml").write_text("moe: {kind: dense}\n")
    return folder


@fuzzed()
@given(json_bytes(FIGURES))
def test_measured_case(case: Path, data: bytes) -> None:
    (case / "traffic.json").write_bytes(data)
    reads(lambda: read_case(Case(run=case)))


LOADS = [{"step": n, "experts": [[1, 2, 3, 4], [4, 3, 2, 1]]} for n in range(3)]


@fuzzed()
@given(st.one_of(json_bytes(LOADS[1]), bytes_like(encoded(LOADS[1])), trees_like(LOADS[1]).map(encoded)))
def test_trace_of_loads(scratch: Path, line: bytes) -> None:
    folder = scratch / "loads"
    folder.mkdir(exist_ok=True)
    (folder / "load.jsonl").write_bytes(b"\n".join([encoded(LOADS[0]), line, encoded(LOADS[2])]))
    found = reads(lambda: recorded(folder, 4))
    assert found is None or found.shape[1] == 4


def _archive(arrays: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)
    return sink.getvalue()


ROUTING = {"layer0.flat": np.array([[0, 1], [2, 3]]), "layer1.flat": np.array([[3, -1]])}
ARRAYS = st.sampled_from(
    [
        np.array([[0, 1], [2, 1]]), np.array([]), np.array(3), np.array([0.5, 1.5]), np.array([-5, -6]),
        np.array(["a"]), np.array([True]), np.array([2**62]), np.array([1 + 2j]), np.array([float("nan")]),
        np.array([10**6]), np.zeros((2, 2, 2), dtype=np.uint64),
    ]
)  # fmt: skip


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Return an archive of other arrays, with other names, damaged bytes, or a header of an array that lies."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(bytes_like(_archive(ROUTING)))
    if kind == 1:
        names = st.sampled_from(["layer0.flat", "layer1.flat", "layer0.one", "layer1.one", "layer0.two", "x"])
        return _archive(draw(st.dictionaries(names, ARRAYS, max_size=3)))
    sink, array = io.BytesIO(), io.BytesIO()
    np.save(array, ROUTING["layer0.flat"])
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(
            "layer0.flat.npy", draw(bytes_like(array.getvalue(), ["(10**12, 2)", "(999999999999, 2)", "'|O'"]))
        )
    return sink.getvalue()


@fuzzed()
@given(archives(), st.sampled_from([4, 6]))
def test_trace_of_routing(scratch: Path, data: bytes, experts: int) -> None:
    folder = scratch / "routing"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "routing.npz").write_bytes(data)
    found = reads(lambda: recorded(folder, experts))
    assert found is None or found.shape[1] == experts
