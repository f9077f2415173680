"""The tokenizer loses nothing, is the same every time, and says what is wrong with a vocabulary."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.config import TokenizerConfig
from moe_dist.data.files import stdlib_source
from moe_dist.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from moe_dist.errors import DataError
from tests.unit.data.samples import documents_of, wikitext_like

AWKWARD = [
    "",
    "\n\n\n",
    "\tif x:\r\n\t\treturn  y   \n",
    "  leading and trailing  ",
    "▁", "a▁b ▁ c▁▁", "▅ \0 \x1f ⁇",
    "<unk> <s> </s> <0x41> <unknown piece> <end of document>",
    "naïve 日本語 🎉 e\u0301 \ufeff \u2028",
]  # fmt: skip
# pieces of text on which a tokenizer could stumble, beside any character there is
FRAGMENTS = st.sampled_from([" ", "  ", "\n", "\t", "▁", "▅", "\0", "<0x0A>", "<unk>", "def f(self):", "the "])


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = TokenizerConfig(kind=request.param, vocab_size=400)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    # the corpus holds the awkward texts, too: reserved names in it must not spoil the vocabulary
    path.write_bytes(train_tokenizer([*documents_of(0, 50), *AWKWARD * 50], config))
    return SentencePieceTokenizer(path)


@settings(deadline=None)
@given(st.lists(st.text(max_size=20) | FRAGMENTS, max_size=10).map("".join))
def test_decoding_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.end_of_document for token in ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_gives_back_awkward_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_all_is_encoding_each_in_order(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.data.tokenizer._BATCH_CHARACTERS", 100)
    texts = [*AWKWARD, *documents_of(3, 20)]
    assert list(tokenizer.encode_all(texts)) == [tokenizer.encode(text) for text in texts]
    assert list(tokenizer.encode_all([])) == []


def test_words_cost_fewer_tokens_than_bytes_and_the_end_of_a_document_is_no_text(tokenizer: Tokenizer) -> None:
    text = next(documents_of(0, 1))
    ids = tokenizer.encode(text)
    assert len(ids) < 0.8 * len(text.encode())
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text
    assert tokenizer.vocab_size == 400


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_again_gives_the_same_bytes(kind: str) -> None:
    config = TokenizerConfig.model_validate({"kind": kind, "vocab_size": 350})
    first = train_tokenizer(documents_of(0, 40), config)
    assert train_tokenizer(documents_of(0, 40), config) == first


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("text", "size", "said"),
    [("abc abd abe " * 9, 4096, r"at most (\d+)"), ("abcdefghijklmnop\n" * 9, 260, r"takes at least (\d+)")],
)
def test_a_vocabulary_that_does_not_fit_is_told_with_the_size_that_does(
    kind: str, text: str, size: int, said: str
) -> None:
    config = TokenizerConfig.model_validate({"kind": kind, "vocab_size": size})
    with pytest.raises(DataError, match=f"^tokenizer.vocab_size={size} .*{said}") as caught:
        train_tokenizer([text], config)
    assert "\n" not in str(caught.value)
    fitting = re.search(said, str(caught.value))
    assert fitting
    train_tokenizer([text], config.model_copy(update={"vocab_size": int(fitting[1])}))


def test_no_text_and_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to train on"):
        train_tokenizer(["\n"], TokenizerConfig())
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_text("nonsense")
    with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "bad.model")


def test_long_lines_train_the_tokenizer_too() -> None:
    words = " ".join(documents_of(0, 40)).replace("\n", " ")
    train_tokenizer([words], TokenizerConfig(vocab_size=400))
    train_tokenizer(["ab" * 200_000 + words], TokenizerConfig(vocab_size=400))


def test_text_of_many_kinds_comes_back_whole(tokenizer: Tokenizer) -> None:
    """Articles in WikiText's format, Python source with its indentation, and letters that training never saw."""
    source = next(text for text in stdlib_source().texts() if "\n        " in text)
    foreign = (
        "na\u00efve \u043f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d \U0001f600 \u2581 a\u0301 \u200d\ufeff\t\r\n"
    )
    text = wikitext_like(40) + source + foreign * 20
    assert tokenizer.decode(tokenizer.encode(text)) == text
