"""Token files hold the documents exactly, and damage anywhere in them is found."""

from pathlib import Path

import numpy as np
import pytest

from moe_dist.data.token_file import open_token_file
from moe_dist.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from moe_dist.errors import DataError
from tests.unit.data.samples import SMALL_TOKENIZER, documents_of, write_token_file

TEXTS = [*documents_of(0, 40), "naïve ▁ 日本\n", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    path.write_bytes(train_tokenizer(TEXTS, SMALL_TOKENIZER))
    return SentencePieceTokenizer(path)


@pytest.fixture
def written(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "train.tokens"
    write_token_file(path, iter(TEXTS), tokenizer)
    return path


def test_documents_come_back_separated_by_ends(written: Path, tokenizer: Tokenizer) -> None:
    tokens = open_token_file(written)
    ends = np.flatnonzero(tokens.ids == tokenizer.end_of_document)
    assert [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens.ids, ends + 1)[:-1]] == TEXTS
    assert ends[-1] == len(tokens) - 1
    assert tokens.ids.dtype == np.uint16
    assert not tokens.ids.flags.writeable


def test_facts_are_those_of_the_text(written: Path, tokenizer: Tokenizer) -> None:
    facts = open_token_file(written).facts
    joined = "".join(TEXTS)
    assert (facts.bytes, facts.words, facts.lines) == (len(joined.encode()), len(joined.split()), joined.count("\n"))
    assert (facts.documents, facts.vocab_size) == (len(TEXTS), tokenizer.vocab_size)
    assert facts.tokens == sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)


def test_a_large_vocabulary_takes_four_bytes_a_token(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    monkeypatch.setattr(tokenizer, "encode_all", lambda texts: ([69_999] for _ in texts))
    write_token_file(tmp_path / "a.tokens", ["x", "y"], tokenizer)
    assert open_token_file(tmp_path / "a.tokens").ids.tolist() == [69_999, 1, 69_999, 1]


@pytest.mark.parametrize("length", [0, 10, 4096, -1])
def test_a_short_file_is_refused_by_name(written: Path, length: int) -> None:
    written.write_bytes(written.read_bytes()[:length])
    with pytest.raises(DataError, match=r"train\.tokens is damaged"):
        open_token_file(written)


@pytest.mark.parametrize("position", [0, 3, 40, 70, 4096, 5000, -1])
def test_a_changed_byte_is_found(written: Path, position: int) -> None:
    content = bytearray(written.read_bytes())
    content[position] ^= 1
    written.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.tokens is damaged") as caught:
        open_token_file(written)
    assert "\n" not in str(caught.value)


def test_other_files_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        open_token_file(tmp_path / "none.tokens")
    (tmp_path / "text.tokens").write_text("text " * 2000)
    with pytest.raises(DataError, match="its header is not one of a token file"):
        open_token_file(tmp_path / "text.tokens")


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def broken() -> object:
        yield TEXTS[0]
        raise KeyError

    with pytest.raises(KeyError):
        write_token_file(tmp_path / "a.tokens", broken(), tokenizer)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
