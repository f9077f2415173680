"""Tokenized arrays and columns as a corpus: the same tokens as the text that they were made from."""

from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from moe_dist.config import CorpusConfig, TokenizerConfig, load_config
from moe_dist.data import PreparedData, open_tokenizer, prepare_data
from moe_dist.data import token_lists as module
from moe_dist.data.hf_tokenizer import find_hf_tokenizer
from moe_dist.errors import ConfigError, DataError
from tests.unit.data.samples import documents_of, hf_tokenizer

pytest.importorskip("tokenizers", reason="needs moe-dist[models]")
SEPARATOR = 300


@pytest.fixture
def tokenizer(tmp_path: Path) -> TokenizerConfig:
    return TokenizerConfig(kind="hf", path=str(hf_tokenizer(tmp_path / "model")), vocab_size=320)


def ids_of(tokenizer: TokenizerConfig) -> list[list[int]]:
    opened = open_tokenizer(find_hf_tokenizer(str(tokenizer.path)))
    return [opened.encode(text) for text in documents_of(4, 30)]


def corpus_of(folder: Path, name: str, **more: object) -> CorpusConfig:
    return CorpusConfig.model_validate(
        {"kind": "tokens", "paths": str(folder / name), "cache_dir": str(folder / "cache"), **more}
    )


def documents_in(data: PreparedData) -> list[list[int]]:
    found = []
    for tokens in (data.train, data.validation):
        ends = np.flatnonzero(tokens.ids == data.end_of_document) + 1
        found += [ids.tolist() for ids in np.split(np.asarray(tokens.ids), ends)[:-1]]
    return sorted(found)


def test_arrays_and_columns_are_the_same_documents(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WINDOW", 7)  # documents lie across windows
    documents = ids_of(tokenizer)
    flat = [token for ids in documents for token in (*ids, SEPARATOR)]
    np.save(tmp_path / "flat.npy", np.array(flat, dtype=np.uint16))
    np.save(tmp_path / "open.npy", np.array(flat[:-1], dtype=np.int64))  # without a separator at its end
    table = pyarrow.table({"input_ids": [*documents, None, []], "attention_mask": [[1]] * (len(documents) + 2)})
    parquet.write_table(table, tmp_path / "rows.parquet")
    expected = None
    for name, more in (
        ("flat.npy", {"separator": SEPARATOR}),
        ("open.npy", {"separator": SEPARATOR}),
        ("rows.parquet", {"text_column": "input_ids"}),
    ):
        data = prepare_data(corpus_of(tmp_path, name, **more), tokenizer)
        found = documents_in(data)
        assert found == sorted([*ids, data.end_of_document] for ids in documents), name
        expected = expected or (data.checksum("train"), data.checksum("validation"))
        assert (data.checksum("train"), data.checksum("validation")) == expected


def test_a_row_of_an_array_is_a_document(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    rows = np.random.default_rng(0).integers(3, 290, (40, 9))
    np.save(tmp_path / "rows.npy", rows)
    data = prepare_data(corpus_of(tmp_path, "rows.npy"), tokenizer)
    assert documents_in(data) == sorted([*row, data.end_of_document] for row in rows.tolist())


def test_what_is_no_list_of_ids_is_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    np.save(tmp_path / "real.npy", np.ones((3, 4)))
    np.save(tmp_path / "flat.npy", np.arange(5))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2), dtype=int))
    np.save(tmp_path / "large.npy", np.arange(5000, 5016).reshape(4, 4))
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "text.parquet")
    for name, match in {
        "real.npy": "holds 2 dimensions of float64: must be one or two dimensions of integers",
        "cube.npy": "holds 3 dimensions of int64",
        "flat.npy": "flat.npy has one dimension: give corpus.separator, the id between its documents",
        "large.npy": r"a document holds the token 50\d\d, but the tokenizer of tokenizer.path has ids below",
        "objects.npy": "objects.npy is not an array of NumPy",
        "text.npy": "text.npy is not an array of NumPy",
        "text.parquet": "row 1: corpus.text_column=text is no list of integers",
        "*.txt": "matches no file",
    }.items():
        with pytest.raises(DataError, match=match):
            prepare_data(corpus_of(tmp_path, name), tokenizer)
    (tmp_path / "ids.jsonl").touch()
    with pytest.raises(DataError, match=r"none of the supported formats: \.npy \.parquet$"):
        prepare_data(corpus_of(tmp_path, "ids.jsonl"), tokenizer)


def test_keys_that_do_not_fit_are_refused() -> None:
    for words, match in (
        (["corpus.kind=tokens"], "corpus.kind=tokens needs corpus.paths: a list of .npy or .parquet files or globs"),
        (["corpus.kind=tokens", "corpus.paths=a.npy"], "corpus.kind=tokens needs the tokenizer that made its files"),
        (["corpus.paths=a.txt", "corpus.separator=1"], "corpus.separator=1 is read with corpus.kind=tokens only, not"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_config(None, words)
