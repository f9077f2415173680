"""Rows of a corpus and of GLUE."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from moe_dist.data.documents import as_documents
from moe_dist.data.files import FileSource
from moe_dist.data.split import Survey, lowest_keys
from moe_dist.evaluation.glue_data import load_task
from moe_dist.evaluation.glue_tasks import TASKS
from tests.fuzz.damage import bytes_like, encoded, fuzzed, json_bytes, reads, trees_like

ROWS: list[dict[str, Any]] = [{"text": f"Row {n}.\nMore.", "meta": {"id": n}, "score": n / 3} for n in range(3)]
GLUE: list[dict[str, Any]] = [
    {"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2, "idx": n} for n in range(3)
]
ARTICLES = "\n = First = \n\n Some text . \n = = Part = = \n\n More . \n\n = Second = \n\n Text . \n" * 2


def _parquet(compression: str) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(
        pa.table({"text": ["one", None, "three"] * 4, "n": list(range(12))}), sink, compression=compression
    )
    return sink.getvalue()


PARQUETS = [_parquet(name) for name in ("none", "snappy", "zstd")]


def _lines(rows: list[Any]) -> bytes:
    return b"".join(encoded(row) + b"\n" for row in rows)


def _read(folder: Path, suffix: str, data: bytes) -> None:
    file = folder / f"corpus{suffix}"
    file.write_bytes(data)
    source = FileSource((file,), "text")
    source.fingerprint()
    documents = reads(lambda: list(as_documents(source.texts())))
    if documents is not None:
        reads(lambda: lowest_keys(Survey.of(documents).keys, 0.05))


@fuzzed()
@given(
    st.one_of(
        bytes_like(_lines(ROWS)),
        st.builds(lambda row: _lines([*ROWS, row, *ROWS]), trees_like(ROWS[0])),
        st.builds(lambda line: _lines(ROWS) + line + b"\n" + _lines(ROWS), json_bytes(ROWS[1])),
    )
)
def test_json_lines(scratch: Path, data: bytes) -> None:
    _read(scratch, ".jsonl", data)


@fuzzed()
@given(
    st.one_of(bytes_like(ARTICLES.encode()), st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace")))
)
def test_plain_text(scratch: Path, data: bytes) -> None:
    _read(scratch, ".txt", data)


@fuzzed()
@given(st.one_of([bytes_like(valid) for valid in PARQUETS]))
def test_parquet(scratch: Path, data: bytes) -> None:
    _read(scratch, ".parquet", data)


@fuzzed()
@given(
    st.one_of(
        bytes_like(_lines(GLUE)),
        st.builds(lambda row: _lines([*GLUE, row]), trees_like(GLUE[0])),
        st.builds(lambda line: _lines(GLUE) + line, json_bytes(GLUE[1])),
    ),
    st.sampled_from(["rte", "stsb"]),
)
def test_glue(scratch: Path, data: bytes, task: str) -> None:
    folder = scratch / task
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_bytes(data if split == "train" else _lines(GLUE))
    found = reads(lambda: load_task(TASKS[task], scratch, max_train=2))
    if found is not None:
        assert json.dumps([example.label for example in found.train])
