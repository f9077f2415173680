"""Megatron-core's tokenized files: read as a corpus, written from one, by its own classes on the other side."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_dist.config import CorpusConfig, TokenizerConfig, load_config
from moe_dist.data import open_tokenizer, prepare_data
from moe_dist.data.blend import BlendPlan
from moe_dist.data.hf_tokenizer import find_hf_tokenizer
from moe_dist.data.megatron_files import match_prefixes, write_megatron_files
from moe_dist.data.sequences import ConcatenatedSequences
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


def test_samples_are_those_of_megatrons_gpt_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both shuffles of Megatron-core's class off, sample i there is sequence i here, token for token."""
    from megatron.core.datasets import gpt_dataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    def in_order(documents: np.ndarray, epochs: int, *_: object) -> np.ndarray:
        return np.tile(documents, epochs).astype(np.int32)

    monkeypatch.setattr(gpt_dataset, "_build_document_index", in_order)
    monkeypatch.setattr(gpt_dataset, "_build_shuffle_index", lambda size, *_: np.arange(size, dtype=np.uint32))
    length, tokens = 16, prepare_data(text_corpus(tmp_path), settings(tmp_path)).train
    write_megatron_files(tokens, tmp_path / "mine")
    options = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(tmp_path / "mine")], None),
        split="100,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=SimpleNamespace(eod=tokens.facts.end_of_document, pad=-1, vocab_size=320, unique_identifiers={}),
        mid_level_dataset_surplus=0.005,
        path_to_cache=str(tmp_path / "indices"),
    )
    data = IndexedDataset(str(tmp_path / "mine"))
    documents = np.arange(len(data), dtype=np.int32)
    theirs = GPTDataset(data, str(tmp_path / "mine"), documents, None, Split.train, options)
    ours = ConcatenatedSequences(tokens, length)
    assert len(theirs) == len(ours) > 20
    for index in range(len(ours)):
        sample, (sequence,) = theirs[index], ours.read(np.array([index]))
        assert sample["tokens"].tolist() == sequence[:-1].tolist()
        assert sample["labels"].tolist() == sequence[1:].tolist()


@pytest.mark.parametrize("weights", [[0.5, 0.25, 0.25], [1, 2], [1, 1, 1], [3, 5, 7, 11], [123, 456, 421], [1, 1000]])
def test_sources_are_those_of_megatrons_index(weights: list[float]) -> None:
    from megatron.core.datasets import helpers_cpp

    size, count = 20_000, len(weights)
    sources, draws = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers_cpp.build_blending_indices(sources, draws, np.array(weights) / sum(weights), count, size, False)
    ours = BlendPlan([(0, weights)], [None] * count).locate(np.arange(size))
    assert np.array_equal(ours[0], sources)
    assert np.array_equal(ours[1], draws)


def test_ties_that_floating_point_breaks_change_no_count() -> None:
    # 0.7 of 10 is 7, which Megatron-core's doubles miss by a rounding error and then take another source first
    from megatron.core.datasets import helpers_cpp

    weights, size = [0.7, 0.2, 0.1], 1000
    sources, draws = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers_cpp.build_blending_indices(sources, draws, np.array(weights), 3, size, False)
    plan = BlendPlan([(0, weights)], [None] * 3)
    for position in range(size):
        counts = np.bincount(sources[:position], minlength=3)
        assert np.abs(counts - plan.drawn(position)).max() <= 1
    assert plan.drawn(size) == (700, 200, 100)
