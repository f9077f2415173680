"""Tokenizers of Hugging Face checkpoints, and token files made with them."""

import json
from pathlib import Path

import pytest

from moe_dist.config import TokenizerConfig
from moe_dist.data import open_tokenizer, prepare_data, tokenizer_in
from moe_dist.data.hf_tokenizer import find_hf_tokenizer
from moe_dist.errors import ConfigError, DataError
from tests.unit.data.samples import documents_of, hf_tokenizer, text_corpus

pytest.importorskip("tokenizers", reason="needs moe-dist[models]")
TEXTS = [*documents_of(1, 20), "naïve ▁ 日本\n\n\t{}", ""]


def test_text_survives_and_documents_end(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(find_hf_tokenizer(str(hf_tokenizer(tmp_path / "model"))))
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (300, 1)
    ids = list(tokenizer.encode_all(TEXTS))
    assert ids == [tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode([*one, 1]) for one in ids] == TEXTS
    assert set(tokenizer.files()) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_token_files_are_those_of_the_tokenizer_wherever_it_is(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    first, second = hf_tokenizer(tmp_path / "one"), hf_tokenizer(tmp_path / "two")
    settings = TokenizerConfig(kind="hf", path=str(first), vocab_size=320)
    data = prepare_data(corpus, settings)
    assert data.vocab_size == 320
    kept = tokenizer_in(data.tokenizer_path.parent)
    assert kept is not None
    assert open_tokenizer(kept).files() == open_tokenizer(find_hf_tokenizer(str(first))).files()
    assert (
        prepare_data(corpus, settings.model_copy(update={"path": str(second)})).sources[""].key == data.sources[""].key
    )
    (second / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    changed = prepare_data(corpus, settings.model_copy(update={"path": str(second)}))
    assert changed.sources[""].key != data.sources[""].key
    assert changed.train.facts.end_of_document == 0


def test_what_cannot_be_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = hf_tokenizer(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=299 has no room for the 300 ids .*: must be >= 300"):
        prepare_data(text_corpus(tmp_path), TokenizerConfig(kind="hf", path=str(folder), vocab_size=299))
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="no file beside it names the token that ends a text"):
        open_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config.json cannot be read as JSON"):
        open_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer.json"):
        open_tokenizer(folder / "tokenizer.json")
    with pytest.raises(DataError, match=r"has no tokenizer.json"):
        find_hf_tokenizer(str(tmp_path))


def test_the_kind_hf_needs_a_path() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.kind=hf needs tokenizer.path"):
        TokenizerConfig(kind="hf")
