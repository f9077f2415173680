"""The stdlib and text corpora, and every way in which they can be refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import CorpusConfig
from moe_dist.data.corpora import open_corpus
from moe_dist.data.documents import Document
from moe_dist.data.files import FileSource
from moe_dist.errors import DataError
from tests.unit.data.samples import Sides, documents_of, sides_of, wikitext_like


def read(paths: list[Path | str], **keys: Any) -> Sides:
    return sides_of(open_corpus(CorpusConfig(kind="text", paths=[str(path) for path in paths], **keys)))


def refusal(paths: list[Path | str], **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(paths, **keys)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_stdlib_is_python_source_and_the_same_every_time() -> None:
    corpus = open_corpus(CorpusConfig(max_bytes=1_000_000))
    split = sides_of(corpus)
    texts = [document.text for side in split for document in side]
    assert 900_000 < sum(len(text.encode()) for text in texts) <= 1_000_000
    assert any("def " in text for text in texts)
    assert not any("site-packages" in str(path) or "test" in path.parts for path in corpus.train._modules())  # type: ignore[attr-defined]
    again = open_corpus(CorpusConfig(max_bytes=1_000_000))
    assert again.identity() == corpus.identity()
    assert sides_of(again) == split


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
    assert f"is a folder: name its files, such as {tmp_path}/*.txt" in refusal([tmp_path])
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "a.csv").write_text("a,b")
    assert "a.csv has none of the supported formats: .txt .tokens .raw .md .rst .py .jsonl .parquet" in refusal(
        [tmp_path / "a.*"]
    )
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
    assert "good.jsonl: line 1: corpus.text_column=label is int, not text; other columns: body" in refusal(
        [good], text_column="label"
    )
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"text": "words"}\n{"te')
    assert f"{torn}: line 2 is not JSON: " in refusal([torn])
    fake = tmp_path / "fake.parquet"
    fake.write_text("not a table")
    assert f"{fake} cannot be read as .parquet: " in refusal([fake])


def rows_of(path: Path, column: str = "text") -> list[str]:
    return list(FileSource((path,), column).texts())


BIG = "1" + "0" * 5000
UNREAD = [
    '{"text": "a", "new": "x"}',  # a column that comes late
    '{"text": "a", "new": 1}',  # and changes its type
    '{"text": "a", "s": {"a": 1}}',
    '{"text": "a", "s": {"a": 1, "b": [2]}}',
    '{"text": "a", "s": 3}',
    '{"text": "a", "k": 1, "k": 2}',
    '{"text": "a", "n": 1e999, "m": -1e999, "nan": NaN}',
    '{"text": "a", "n": "\\ud800"}',
    f'{{"text": "a", "n": {BIG}}}',
    '{"text": "a", "t": "2026-13-45", "": null, "l": [1, "a", null, {}]}',
]


def test_columns_that_are_not_read_never_matter_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"text": "a"}'] * 1000 + UNREAD) + "\n")
    assert rows_of(path) == ["a"] * (1000 + len(UNREAD))


def test_a_text_column_may_first_be_seen_after_megabytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    filler = '{"other": "' + "x" * 1000 + '"}\n'
    path.write_text(filler * 11_000 + '{"text": "late"}\n')
    assert rows_of(path) == ["late"]
    assert f"{path}: 11000 of 11001 rows have no text and are skipped, the first on line 1" in caplog.text


def test_columns_that_are_not_read_never_matter_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "map": pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "text": pyarrow.array(["first", "second"], pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
        "half": pyarrow.array([b"1", b"2"]),
        "text.inner": pyarrow.array([1, 2]),
    }
    # datasets would refuse the feature of that type
    features = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "map": {"_type": "Nowhere"}}}}
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == ["first", "second"]
    with pytest.raises(DataError, match=r"rows.parquet: row 1: corpus.text_column=half is bytes, not text; other"):
        rows_of(tmp_path / "rows.parquet", "half")
    with pytest.raises(DataError, match=r"has no column corpus.text_column=body; it has: map, text, half, text.inner"):
        rows_of(tmp_path / "rows.parquet", "body")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": 3}', r"rows.jsonl: line 3: corpus.text_column=text is int, not text; other columns: none"),
        ('{"text": ["a"], "b": 1}', r"rows.jsonl: line 3: corpus.text_column=text is list, not text; other columns: b"),
        ('["text"]', r"rows.jsonl: line 3 is not a JSON object: .jsonl holds one object per line"),
        ('{"text": "a"', r"rows.jsonl: line 3 is not JSON: Expecting ',' delimiter"),
        ('{"text": ' + "[" * 100_000, r"rows.jsonl: line 3 is nested too deeply"),
        ('{"text": "\udcff"}', r"rows.jsonl: line 3 is not UTF-8 text: byte 10"),
    ],
    ids=["number", "list", "no object", "torn", "nested", "not UTF-8"],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, line: str, said: str) -> None:
    text = '{"text": "fine"}\n\n' + line + "\n"
    (tmp_path / "rows.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=said) as caught:
        rows_of(tmp_path / "rows.jsonl")
    assert "\n" not in str(caught.value)


def test_the_name_that_was_given_decides_the_format_of_a_link(tmp_path: Path) -> None:
    """As in Hugging Face's cache and git-annex: the files are named by their contents' digests."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0f3a9c").write_text('{"text": "one"}\n{"text": "two"}\n')
    (blobs / "77aa01").write_text('{"text": "held"}\n')
    (snapshot / "train.jsonl").symlink_to("../../blobs/0f3a9c")
    (snapshot / "again.jsonl").symlink_to("../../blobs/0f3a9c")
    (snapshot / "held.jsonl").symlink_to("../../blobs/77aa01")
    split = read([snapshot / "*.jsonl"], validation_paths=[str(snapshot / "held.jsonl")])
    assert [document.text for document in split.train] == ["one", "two"]  # each file once
    assert [document.text for document in split.validation] == ["held"]
    folder = tmp_path / "linked"
    folder.symlink_to(snapshot)
    assert [d.text for d in read([folder / "train.jsonl"], validation_fraction=0.5).validation] in (["one"], ["two"])
    (snapshot / "absent.jsonl").symlink_to("../../blobs/not-fetched")
    assert "is a link to '../../blobs/not-fetched', which does not exist" in refusal([snapshot / "absent.jsonl"])


def test_a_path_that_exists_wins_over_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "title[1].txt").write_text("bracketed")
    (tmp_path / "title1.txt").write_text("plain")
    held = [str(tmp_path / "title1.txt")]
    assert [d.text for d in read([tmp_path / "title[1].txt"], validation_paths=held).train] == ["bracketed"]
    assert [d.text for d in read([tmp_path / "title*.txt"], validation_paths=held).train] == ["bracketed"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [d.text for d in read(["~/title[1].txt"], validation_paths=["~/title1.txt"]).train] == ["bracketed"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_do_not_change_documents(tmp_path: Path, line_end: str, mark: str) -> None:
    """120 articles, of which 6 are held out (5 %), whatever system wrote the file."""
    file = tmp_path / "wiki.txt"
    file.write_bytes((mark + wikitext_like(120).replace("\n", line_end)).encode())
    split = read([file])
    assert (len(split.train), len(split.validation)) == (114, 6)
    assert "".join(d.text for d in sorted((d for side in split for d in side), key=_number)) == wikitext_like(120)
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text.replace("\n", line_end)}) for text in ("a\nb", "c")]
    rows.write_bytes((mark + line_end.join(lines)).encode())
    assert rows_of(rows) == ["a\nb", "c"]


def _number(document: Document) -> int:
    return int(document.text.split(" = ")[1].split()[1])


def test_a_text_on_one_line_is_enough_for_a_corpus(tmp_path: Path) -> None:
    """180,000 characters in sentences of 50: 11 documents, of which 1 is held out."""
    (tmp_path / "line.txt").write_text(
        "".join(f"Sentence number {n:06} is as long as all of them. " for n in range(3600))
    )
    split = read([tmp_path / "line.txt"])
    assert (len(split.train), len(split.validation)) == (10, 1)
