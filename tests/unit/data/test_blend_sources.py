"""Blends from configuration to batches: refusals in one line, one tokenizer for all, each source in its own place."""

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dist import cli
from moe_dist.config import load_config
from moe_dist.config.sections.data import weight_changes
from moe_dist.data import open_batches, open_sequences, prepare_data
from moe_dist.data.cache import exclusive
from moe_dist.errors import ConfigError, DataError
from tests.unit.data.samples import documents_of

REFUSED = {
    "corpus.sources.web.foo='a': Extra inputs": ["corpus.sources.web.foo=a"],
    "corpus.sources.web.weight=-1 must be >= 0": ["corpus.sources.web.weight=-1"],
    "corpus.kind=blend needs corpus.sources": ["corpus.kind=blend"],
    "corpus.sources.a.kind=text needs corpus.sources.a.paths": ["corpus.sources.a.kind=text"],
    "corpus.sources.a.kind=stdlib does not read corpus.sources.a.paths=": [
        "corpus.sources.a={kind: stdlib, paths: x.txt}"
    ],
    "corpus.sources.a.kind=chat needs the chat template": ["corpus.sources.a={kind: chat, paths: x.jsonl}"],
    "corpus.kind=blend does not read corpus.max_bytes": ["corpus.sources.a={}", "corpus.max_bytes=3"],
    "corpus.sources is read with corpus.kind=blend only, not text": [
        "corpus.sources.a={}",
        "corpus.kind=text",
        "corpus.paths=x.txt",
    ],
    "all weights are 0 from step 0 on": ["corpus.sources.a.weight=0"],
    "all weights are 0 from step 5 on": ["corpus.sources.a={}", "corpus.schedule=[{step: 5, weights: {a: 0}}]"],
    "corpus.schedule: 'b' at step 3 is none of corpus.sources: a": [
        "corpus.sources.a={}",
        "corpus.schedule=[{step: 3, weights: {b: 1}}]",
    ],
    "corpus.schedule: steps must ascend, not [4, 4]": [
        "corpus.sources.a={}",
        "corpus.schedule=[{step: 4, weights: {a: 1}}, {step: 4, weights: {a: 2}}]",
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_blended_is_refused(message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, REFUSED[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_change_keeps_the_weights_that_it_does_not_name() -> None:
    words = ["corpus.sources={a: {weight: 2}, b: {}}", "corpus.schedule=[{step: 9, weights: {b: 0.5}}]"]
    assert weight_changes(load_config(None, words).corpus) == [(0, {"a": 2, "b": 1}), (9, {"a": 2, "b": 0.5})]
    words[1] = "corpus.schedule=[{step: 0, weights: {a: 0}}]"
    assert weight_changes(load_config(None, words).corpus) == [(0, {"a": 0, "b": 1})]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A blend of two small sources."""
    for number, name in enumerate(("web", "books")):
        lines = [json.dumps({"text": text}) for text in documents_of(number, 60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    small = ["model.sequence_length=16", "tokenizer.vocab_size=400"]
    small.append("train={steps: 10, warmup_steps: 1, global_batch_size: 8}")
    sources = [f"corpus.sources.{name}.paths={tmp_path}/{name}.jsonl" for name in ("web", "books")]
    return [*small, *sources, f"corpus.cache_dir={tmp_path}/cache"]


def test_sources_share_a_tokenizer_and_are_prepared_apart(words: list[str], tmp_path: Path) -> None:
    config = load_config(None, words)
    data = prepare_data(config.corpus, config.tokenizer)
    assert list(data.sources) == ["web", "books"]
    assert len({source.tokenizer_path.read_bytes() for source in data.sources.values()}) == 1
    folders = {source.train.path.parent for source in data.sources.values()}
    assert len(folders) == 2
    # a damaged tokenizer is trained again: the same bytes, so that no source is prepared anew
    (kept,) = (tmp_path / "cache" / "tokenizers").glob("*.model")
    kept.write_bytes(kept.read_bytes()[:-1])
    again = load_config(None, [*words, "corpus.schedule=[{step: 5, weights: {web: 3}}]"])
    assert {
        source.train.path.parent for source in prepare_data(again.corpus, config.tokenizer).sources.values()
    } == folders
    assert data.checksum("train") != data.checksum("validation")


def test_processes_share_the_sources(words: list[str], tmp_path: Path) -> None:
    """While another process prepares the first source, this one prepares the second, then waits for the first."""
    config = load_config(None, words)
    alone = prepare_data(config.corpus.model_copy(update={"cache_dir": str(tmp_path / "alone")}), config.tokenizer)
    first, second = (tmp_path / "cache" / "prepared" / source.key for source in alone.sources.values())
    found = []
    with exclusive(first.with_suffix(".lock")):
        thread = threading.Thread(target=lambda: found.append(prepare_data(config.corpus, config.tokenizer)))
        thread.start()
        while not (second / "manifest.json").exists():
            thread.join(0.01)
        thread.join(0.1)
        assert thread.is_alive()
        assert not first.exists()
    thread.join(60)
    assert found[0].checksum("train") == alone.checksum("train")
    names = ("train.tokens", "validation.tokens", "tokenizer.model")
    for source, other in zip(alone.sources.values(), (first, second), strict=True):
        for name in names:
            assert (source.train.path.parent / name).read_bytes() == (other / name).read_bytes()


def test_limits_end_a_blend_before_its_last_step(words: list[str]) -> None:
    limits = ["corpus.sources.web.max_tokens=320", "corpus.sources.books.max_epochs=0.1"]
    config = load_config(None, [*words, limits[0]])
    data = prepare_data(config.corpus, config.tokenizer)
    loader = open_batches(config, data)
    assert loader.plan.drawn(10 * 8) == (20, 60)
    sources = [loader.batch(step).source_B.tolist() for step in range(10)]
    assert sum(source.count(0) for source in sources) == 20
    books = int(0.1 * len(open_sequences(config, data, "train")["books"]))
    with pytest.raises(DataError, match=rf"^the sources of corpus.sources run out at step {(20 + books) // 8 + 1} of"):
        open_batches(load_config(None, [*words, *limits, "train.steps=1000"]), data)
    with pytest.raises(DataError, match=r"^corpus\.sources\.web: validation text of \d+ tokens is shorter than one"):
        open_sequences(load_config(None, [*words, "model.sequence_length=4096"]), data, "validation")
    missing = load_config(None, [*words, "corpus.sources.web.paths=none.txt"])
    with pytest.raises(DataError, match=r"^corpus\.sources\.web\.paths: 'none.txt' matches no file"):
        prepare_data(missing.corpus, missing.tokenizer)


def test_inspect_tells_each_side_of_each_source(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "blend.yaml").write_text("corpus: {packing: best_fit}\n")
    shown = CliRunner().invoke(cli.app, ["data", "inspect", str(tmp_path / "blend.yaml"), *words, "--samples", "1"])
    assert shown.exit_code == 0, shown.output
    for title in ("web train", "web validation", "books train", "books validation"):
        assert title in shown.output
    assert shown.output.count("documents are cut") == 4
    prefix = tmp_path / "out" / "mine"
    made = CliRunner().invoke(
        cli.app, ["data", "prepare", str(tmp_path / "blend.yaml"), *words, f"--megatron={prefix}"]
    )
    assert made.exit_code == 0, made.output
    assert (tmp_path / "out" / "mine-books-validation.idx").exists()
