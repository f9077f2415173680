"""Which text is evaluated on, and how it is counted."""

import json
from pathlib import Path

import pytest

from moe_dist.config import TokenizerConfig
from moe_dist.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from moe_dist.errors import DataError
from moe_dist.evaluation.texts import encode_text, open_text

ARTICLES = " \n = One = \n \n Words , and more words . \n \n = Two = \n \n A few <unk> words . \n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer([ARTICLES * 20], TokenizerConfig(vocab_size=300)))
    return SentencePieceTokenizer(path)


def test_words_and_line_ends_are_those_of_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "wiki.valid.tokens"
    file.write_text(ARTICLES)
    text = encode_text(open_text(tmp_path, "validation"), tokenizer)
    assert (text.words, text.lines, text.bytes) == (len(ARTICLES.split()), 8, len(ARTICLES))
    end = tokenizer.end_of_document
    assert text.ids[0] == text.ids[-1] == end
    assert text.documents == (text.ids == end).sum() - 1 == 3  # what stands before the first title is one
    assert tokenizer.decode([int(token) for token in text.ids if token != end]) == ARTICLES
    assert text.source == "wiki.valid.tokens"


def test_rows_of_a_table_are_joined_to_the_same_articles(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "test.txt").write_text(ARTICLES)
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps({"text": line}) + "\n" for line in ARTICLES.splitlines(keepends=True)))
    plain, rows = (encode_text(open_text(path, "test"), tokenizer) for path in (tmp_path / "test.txt", table))
    assert (plain.words, plain.lines, plain.bytes) == (rows.words, rows.lines, rows.bytes)
    assert plain.ids.tolist() == rows.ids.tolist()


def test_data_errors_are_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"--text .*/nowhere: no such file or folder"):
        open_text(tmp_path / "nowhere", "test")
    with pytest.raises(DataError, match=r"holds no test split: give one file, such as .*/test.txt"):
        open_text(tmp_path, "test")
    (tmp_path / "table.csv").write_text("words\n")
    with pytest.raises(DataError, match=r"--text: .*/table.csv has none of the supported formats: .txt"):
        open_text(tmp_path / "table.csv", "test")
    for name in ("test.txt", "wiki.test.raw"):
        (tmp_path / name).write_text(" \n")
    with pytest.raises(DataError, match=r"holds test.txt, wiki.test.raw: give one file"):
        open_text(tmp_path, "test")
    with pytest.raises(DataError, match=r"test.txt holds no words"):
        encode_text(open_text(tmp_path / "test.txt", "test"), tokenizer)
