"""Megatron-core's tokenized files: read as a corpus, written from one, by its own classes on the other side."""

from pathlib import Path

import numpy as np
import pytest

from moe_dist.config import CorpusConfig, TokenizerConfig, load_config
from moe_dist.data import open_tokenizer, prepare_data
from moe_dist.data.hf_tokenizer import find_hf_tokenizer
from moe_dist.data.megatron_files import match_prefixes, write_megatron_files
from moe_dist.errors import ConfigError, DataError
from tests.unit.data.samples import documents_of, hf_tokenizer, text_corpus

pytest.importorskip("tokenizers", reason="needs moe-dist[models]")


def write_by_megatron(prefix: Path, documents: list[list[list[int]]]) -> None:
    """Documents of several sentences, as its preprocess_data writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sentences in documents:
        tokens = np.array([token for sentence in sentences for token in sentence])
        builder.add_document(tokens, [len(sentence) for sentence in sentences])
    builder.finalize(f"{prefix}.idx")


def settings(tmp_path: Path) -> TokenizerConfig:
    folder = tmp_path / "model"
    path = folder if folder.exists() else hf_tokenizer(folder)
    return TokenizerConfig(kind="hf", path=str(path), vocab_size=320)


def corpus_of(tmp_path: Path, name: str) -> CorpusConfig:
    return CorpusConfig(kind="megatron", paths=[str(tmp_path / name)], cache_dir=str(tmp_path / "cache"))


def test_files_of_megatron_give_the_tokens_of_their_text(tmp_path: Path) -> None:
    tokenizer_config, texts = settings(tmp_path), list(documents_of(4, 30))
    tokenizer = open_tokenizer(find_hf_tokenizer(str(tokenizer_config.path)))
    end = tokenizer.end_of_document
    encoded = [tokenizer.encode(text) for text in texts]
    # some with their end, some in two sentences
    documents = [[ids[:5], [*ids[5:], end]] if number % 2 else [ids] for number, ids in enumerate(encoded)]
    write_by_megatron(tmp_path / "web_text_document", documents)
    data = prepare_data(corpus_of(tmp_path, "web_text_document"), tokenizer_config)
    found = [ids.tolist() for tokens in (data.train, data.validation) for ids in np.split(
        np.asarray(tokens.ids), np.flatnonzero(tokens.ids == end) + 1)[:-1]]  # fmt: skip
    assert sorted(found) == sorted([*ids, end] for ids in encoded)
    assert data.train.facts.bytes + data.validation.facts.bytes == sum(len(text.encode()) for text in texts)
    assert data.vocab_size == 320


def test_megatron_reads_what_is_written_here(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokens = prepare_data(text_corpus(tmp_path), settings(tmp_path)).train
    write_megatron_files(tokens, tmp_path / "out" / "mine")
    data = IndexedDataset(str(tmp_path / "out" / "mine"))
    assert len(data) == tokens.facts.documents
    joined = np.concatenate([data[number] for number in range(len(data))])
    assert np.array_equal(joined, tokens.ids)
    assert data[0][-1] == tokens.facts.end_of_document
    # and it is read here again: the same documents, as some are held out anew
    again = prepare_data(corpus_of(tmp_path, "out/mine.idx"), settings(tmp_path))
    assert len(again.train) + len(again.validation) == len(tokens)


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    write_by_megatron(tmp_path / "a", [[[5, 6]], [[7, 8, 9]], [[310]]])
    assert match_prefixes("corpus.paths", [str(tmp_path / name) for name in ("a.bin", "a.idx", "a")]) == (
        tmp_path / "a",
    )
    with pytest.raises(DataError, match=r"holds the token 310, but the tokenizer .* has ids below 300"):
        prepare_data(corpus_of(tmp_path, "a"), settings(tmp_path))
    with pytest.raises(DataError, match=r"corpus\.paths: .*none\.bin is missing: tokenized files are"):
        prepare_data(corpus_of(tmp_path, "none"), settings(tmp_path))
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"a\.bin is damaged: 10 bytes instead of the 12 of its index"):
        prepare_data(corpus_of(tmp_path, "a"), settings(tmp_path))
    (tmp_path / "a.bin").write_bytes(whole)
    for content in (b"", b"no index of any kind", (tmp_path / "a.idx").read_bytes()[:40]):
        (tmp_path / "a.idx").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.idx is no index of Megatron-core's"):
            prepare_data(corpus_of(tmp_path, "a"), settings(tmp_path))
    with pytest.raises(ConfigError, match=r"corpus\.kind=megatron needs the tokenizer that made its files"):
        load_config(None, ["corpus.kind=megatron", "corpus.paths=a"])
    with pytest.raises(ConfigError, match=r"corpus\.max_bytes=5 would cut documents of corpus\.kind=megatron"):
        load_config(None, ["corpus.kind=megatron", "corpus.paths=a", "corpus.max_bytes=5"])
