"""Rows of GLUE from local files: what is read, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import DataError
from moe_dist.evaluation.glue_data import Example, has_task, load_task
from moe_dist.evaluation.glue_tasks import TASKS

GOOD = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2, "idx": n} for n in range(4)]


def write(folder: Path, task: str, split: str, rows: list[Any]) -> None:
    file = folder / task / f"{split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        write(tmp_path, "rte", split, GOOD)
    return tmp_path


def test_rows_are_read_as_they_are(folder: Path) -> None:
    data = load_task(TASKS["rte"], folder)
    assert data.train == data.validation[""]
    assert data.train[1] == Example(("a 1", "b 1"), 1.0)
    assert has_task(TASKS["rte"], folder)
    assert not has_task(TASKS["cola"], folder)


def test_fewer_rows_are_always_the_same_ones(folder: Path) -> None:
    write(folder, "rte", "train", [{**GOOD[0], "sentence1": str(n)} for n in range(100)])
    few = [load_task(TASKS["rte"], folder, max_train=10, max_eval=3) for _ in range(2)]
    assert few[0] == few[1]
    assert (len(few[0].train), len(few[0].validation[""])) == (10, 3)
    assert [row.sentences[0] for row in few[0].train] != [str(n) for n in range(10)]


def test_mnli_has_two_validation_splits_or_the_matched_one(tmp_path: Path) -> None:
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in (0, 1, 2)]
    for split in ("train", "validation"):
        write(tmp_path, "mnli", split, rows)
    assert list(load_task(TASKS["mnli"], tmp_path).validation) == ["_matched"]
    for split in ("validation_matched", "validation_mismatched"):
        write(tmp_path, "mnli", split, rows)
    assert list(load_task(TASKS["mnli"], tmp_path).validation) == ["_matched", "_mismatched"]


def _without(column: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD[0].items() if name != column}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], r"rte/validation.jsonl: the split is empty"),
        ([GOOD[0], _without("sentence2")], r"row 2 has no column 'sentence2'; it has: sentence1, label, idx"),
        ([_without("label")], r"row 1 has no column 'label'"),
        ([{**GOOD[0], "label": -1}], r"label=-1, expected 0, 1 \(rte\) \(those of test splits are not public\)"),
        ([{**GOOD[0], "label": 2}], r"label=2, expected 0, 1 \(rte\)"),
        ([{**GOOD[0], "label": 0.5}], r"label=0.5"),
        ([{**GOOD[0], "label": float("nan")}], r"label=nan"),
        ([{**GOOD[0], "label": 10**400}], r"label=1000"),
        ([{**GOOD[0], "label": None}], r"label=None"),
        ([{**GOOD[0], "label": True}], r"label=True"),
        ([{**GOOD[0], "sentence1": None}], r"sentence1 is None, not text"),
        ([[1]], r"line 1 is not a JSON object"),
    ],
)
def test_wrong_rows_are_one_clear_line(folder: Path, rows: list[Any], said: str) -> None:
    write(folder, "rte", "validation", rows)
    with pytest.raises(DataError, match=said) as refused:
        load_task(TASKS["rte"], folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_wrong_files_are_one_clear_line(folder: Path) -> None:
    (folder / "rte" / "train.jsonl").write_text('{"sentence1": \n')
    with pytest.raises(DataError, match=r"train.jsonl: line 1 is not JSON"):
        load_task(TASKS["rte"], folder)
    (folder / "rte" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train.jsonl: no such file: --glue takes a folder with rte/train.jsonl"):
        load_task(TASKS["rte"], folder)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"sentence1": "caf\xe9"}', r"line 2 is not UTF-8 text: byte 18"),
        (b"[" * 200_000, r"line 2 is nested too deeply"),
        (b'{"sentence1": ', r"line 2 is not JSON: "),
    ],
)
def test_lines_that_are_no_json_are_named(folder: Path, line: bytes, said: str) -> None:
    write(folder, "rte", "validation", [GOOD[0]])
    file = folder / "rte" / "validation.jsonl"
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=said):
        load_task(TASKS["rte"], folder)


@pytest.mark.parametrize("label", [5.5, -0.1, "3", float("nan"), float("inf"), 10**400])
def test_similarities_are_from_0_to_5(tmp_path: Path, label: Any) -> None:
    write(tmp_path, "stsb", "train", [{**GOOD[0], "label": 3.8}, {**GOOD[0], "label": label}])
    with pytest.raises(DataError, match=r"row 2: label=.*, expected a number from 0 to 5 \(stsb\)"):
        load_task(TASKS["stsb"], tmp_path)
