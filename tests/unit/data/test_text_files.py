"""The stdlib and text corpora, and every way in which they can be refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import CorpusConfig
from moe_dist.data.corpora import open_corpus
from moe_dist.data.documents import HeldOutSplit
from moe_dist.data.files import FileSource
from moe_dist.errors import DataError
from tests.unit.data.samples import documents_of


def read(paths: list[Path | str], **keys: Any) -> HeldOutSplit:
    return open_corpus(CorpusConfig(kind="text", paths=[str(path) for path in paths], **keys)).documents()


def refusal(paths: list[Path | str], **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(paths, **keys)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_stdlib_is_python_source_and_the_same_every_time() -> None:
    corpus = open_corpus(CorpusConfig(max_bytes=1_000_000))
    split = corpus.documents()
    texts = [document.text for side in split for document in side]
    assert 900_000 < sum(len(text.encode()) for text in texts) <= 1_000_000
    assert any("def " in text for text in texts)
    assert not any("site-packages" in str(path) or "test" in path.parts for path in corpus.train._modules())  # type: ignore[attr-defined]
    again = open_corpus(CorpusConfig(max_bytes=1_000_000))
    assert again.identity() == corpus.identity()
    assert again.documents() == split


def test_text_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    texts = list(documents_of(0, 12))
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    both = [tmp_path / "0*.txt", tmp_path / "**" / "*.txt"]
    split = read([*both])
    assert sorted(d.text for side in split for d in side) == sorted(texts)
    assert [d.text for d in split.train] == [text for text in texts if text in {d.text for d in split.train}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tables_give_one_document_a_row(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset

    texts = list(documents_of(1, 30))
    table = Dataset.from_dict({"number": list(range(30)), "body": texts})
    path = tmp_path / f"odd [name]{suffix}"
    _ = table.to_json(str(path)) if suffix == ".jsonl" else table.to_parquet(str(path))
    split = read([tmp_path / f"*{suffix}"], text_column="body")
    assert sorted(d.text for side in split for d in side) == sorted(texts)


def test_rows_without_a_text_are_left_out(tmp_path: Path) -> None:
    rows = ['{"text": "first"}', '{"text": null}', '{"text": "third"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert list(FileSource((tmp_path / "rows.jsonl",), "text").texts()) == ["first", "third"]


def test_the_identity_follows_the_content_not_the_date(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text")
    config = CorpusConfig(kind="text", paths=[str(path)])
    before = open_corpus(config).identity()
    path.write_text("two text")
    assert open_corpus(config).identity() != before
    path.write_text("one text")
    assert open_corpus(config).identity() == before
    assert open_corpus(config.model_copy(update={"max_bytes": 5})).identity() != before


def test_validation_files_and_their_duplicates_are_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("held")
    (tmp_path / "copy.txt").write_text("held")
    split = read([tmp_path / "*.txt"], validation_paths=[str(tmp_path / "b.txt")])
    assert [d.text for d in split.train] == ["first"]
    assert [d.text for d in split.validation] == ["held"]
    assert "nothing to train on" in refusal([tmp_path / "copy.txt"], validation_paths=[str(tmp_path / "b.txt")])
    assert "nothing to train on" in refusal([tmp_path / "b.txt"], validation_paths=[str(tmp_path / "*.txt")])


def test_files_that_cannot_be_found_or_read_are_named(tmp_path: Path) -> None:
    assert "corpus.paths: " in refusal([tmp_path / "none*.txt"])
    assert "matches no file" in refusal([tmp_path])
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "a.csv").write_text("a,b")
    assert "a.csv is not one of the formats read: .txt .tokens .raw .jsonl .parquet" in refusal([tmp_path / "a.*"])
    assert "corpus.validation_paths: " in refusal([tmp_path / "a.txt"], validation_paths=["no.txt"])
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert "latin.txt is not UTF-8 text: byte 2 is 0xef" in refusal([tmp_path / "latin.txt"])
    assert "cannot be held out" not in refusal([tmp_path / "a.txt"], validation_paths=[str(tmp_path / "latin.txt")])
    assert "none can be held out" in refusal([tmp_path / "a.txt"])


@pytest.mark.parametrize("name", ["blank.txt", "empty.txt", "empty.jsonl", "blank.jsonl"])
def test_a_corpus_without_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(" \n\n" if "blank" in name else "")
    assert name in refusal([tmp_path / name])


def test_tables_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps({"body": "words", "label": 1}) + "\n" for _ in range(3)))
    assert "has no column corpus.text_column=text; it has: body, label" in refusal([good])
    assert "row 0 of corpus.text_column=label is int, not text" in refusal([good], text_column="label")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"text": "words"}\n{"te')
    assert f"{torn} cannot be read as .jsonl: " in refusal([torn])
    fake = tmp_path / "fake.parquet"
    fake.write_text("not a table")
    assert f"{fake} cannot be read as .parquet: " in refusal([fake])
