"""Preparing data once for all processes, from a cold, a warm, a damaged and a crashed cache."""

import hashlib
import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.config import CorpusConfig, TokenizerConfig
from moe_dist.data import PreparedData, prepare_data
from moe_dist.data.cache import atomic_write, exclusive
from moe_dist.data.corpora import open_corpus
from moe_dist.data.prepare import _key
from moe_dist.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from moe_dist.errors import DataError
from tests.unit.data.samples import SMALL_TOKENIZER, text_corpus

SPAWN = multiprocessing.get_context("spawn")  # as a launcher starts ranks


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    return text_corpus(tmp_path)


def texts_of(data: PreparedData) -> tuple[set[str], set[str]]:
    """The documents on the training and the validation side, decoded."""
    tokenizer = SentencePieceTokenizer(data.tokenizer_path)

    def decoded(ids: Any) -> set[str]:
        ends = np.flatnonzero(ids == tokenizer.end_of_document)
        return {tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]}

    return decoded(data.train.ids), decoded(data.validation.ids)


def count_trainings(monkeypatch: pytest.MonkeyPatch, record: Path) -> None:
    def counted(*arguments: Any) -> bytes:
        with record.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return train_tokenizer(*arguments)

    monkeypatch.setattr("moe_dist.data.plan.train_tokenizer", counted)


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_every_document_is_on_one_side(corpus: CorpusConfig, tmp_path: Path) -> None:
    data = prepare_data(corpus, SMALL_TOKENIZER)
    train, validation = texts_of(data)
    assert train.isdisjoint(validation)
    assert train | validation == {path.read_text() for path in tmp_path.glob("*.txt")}
    assert len(validation) == 3
    assert data.vocab_size == data.train.facts.vocab_size == 400


def test_a_second_call_reads_the_cache_and_other_settings_do_not(
    corpus: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    count_trainings(monkeypatch, record)
    first = prepare_data(corpus, SMALL_TOKENIZER)
    again = prepare_data(corpus, SMALL_TOKENIZER)
    assert (again.sources[""].key, again.train.checksum) == (first.sources[""].key, first.train.checksum)
    assert len(record.read_text().splitlines()) == 1
    others = [
        (corpus, TokenizerConfig(vocab_size=401)),
        (corpus, TokenizerConfig(vocab_size=400, kind="unigram")),
        (corpus.model_copy(update={"validation_fraction": 0.2}), SMALL_TOKENIZER),
        (corpus.model_copy(update={"max_bytes": 20_000}), SMALL_TOKENIZER),
    ]
    assert len({first.sources[""].key, *(prepare_data(*other).sources[""].key for other in others)}) == 5
    assert len(record.read_text().splitlines()) == 5


def test_two_caches_hold_the_same_bytes(corpus: CorpusConfig, tmp_path: Path) -> None:
    first = prepare_data(corpus, SMALL_TOKENIZER)
    second = prepare_data(corpus.model_copy(update={"cache_dir": str(tmp_path / "other")}), SMALL_TOKENIZER)
    assert first.train.path != second.train.path
    assert content_of(first.train.path.parent) == content_of(second.train.path.parent)


@pytest.mark.parametrize("name", ["tokenizer.model", "train.tokens", "validation.tokens", "manifest.json"])
@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_a_damaged_cache_is_made_again(corpus: CorpusConfig, name: str, damage: str) -> None:
    data = prepare_data(corpus, SMALL_TOKENIZER)
    folder = data.train.path.parent
    good = content_of(folder)
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage == "short":
        (folder / name).write_bytes(content[: len(content) // 2])
    if damage == "changed":
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    assert prepare_data(corpus, SMALL_TOKENIZER).train.checksum == data.train.checksum
    assert content_of(folder) == good


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    held = tmp_path / "held.txt"
    held.write_text("zzzqqqzzz " * 5000)
    data = prepare_data(corpus.model_copy(update={"validation_paths": [str(held)]}), SMALL_TOKENIZER)
    # one token would do for a word this frequent, had it been seen
    assert len(SentencePieceTokenizer(data.tokenizer_path).encode("zzzqqqzzz")) > 2


def test_errors_are_one_line_and_leave_no_lock(corpus: CorpusConfig, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=r"^tokenizer\.vocab_size=30000 .* at most \d+"):
            prepare_data(corpus, TokenizerConfig(vocab_size=30_000))
    blocked = tmp_path / "a file"
    blocked.write_text("")
    with pytest.raises(DataError, match=r"^corpus\.cache_dir=.*a file cannot be used"):
        prepare_data(corpus.model_copy(update={"cache_dir": str(blocked)}), SMALL_TOKENIZER)


def _prepare_together(corpus: CorpusConfig, start: Barrier, record: Path, results: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        count_trainings(patch, record)
        start.wait(timeout=120)
        data = prepare_data(corpus, SMALL_TOKENIZER)
        results.put((data.sources[""].key, data.train.checksum, data.validation.checksum, int(data.train.ids[-1])))


def test_processes_that_start_together_do_the_work_once(corpus: CorpusConfig, tmp_path: Path) -> None:
    processes = 3
    start, results, record = SPAWN.Barrier(processes), SPAWN.Queue(), tmp_path / "record"
    arguments = (corpus, start, record, results)
    children = [SPAWN.Process(target=_prepare_together, args=arguments) for _ in range(processes)]
    for child in children:
        child.start()
    seen = {results.get(timeout=120) for _ in children}
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [0] * processes
    assert len(seen) == 1
    assert len(record.read_text().splitlines()) == 1


def folder_of(corpus: CorpusConfig) -> Path:
    return Path(corpus.cache_dir) / "prepared" / _key(open_corpus(corpus), SMALL_TOKENIZER, {})


def _hang_while_working(corpus: CorpusConfig, working: Event) -> None:
    def hang(*arguments: Any) -> bytes:
        with atomic_write(folder_of(corpus) / "train.tokens") as path:
            path.write_bytes(b"half")
            working.set()
            time.sleep(300)
        return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_dist.data.plan.train_tokenizer", hang)
        prepare_data(corpus, SMALL_TOKENIZER)


def test_a_process_killed_at_work_wedges_nobody_and_leaves_nothing(corpus: CorpusConfig) -> None:
    working = SPAWN.Event()
    child = SPAWN.Process(target=_hang_while_working, args=(corpus, working))
    child.start()
    assert working.wait(timeout=120)
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    child.join(timeout=60)
    folder = folder_of(corpus)
    assert [path.suffix for path in folder.iterdir()] == [".tmp"]
    data = prepare_data(corpus, SMALL_TOKENIZER)
    assert sorted(content_of(folder)) == ["manifest.json", "tokenizer.model", "train.tokens", "validation.tokens"]
    assert len(data.train) > 0


def test_a_file_system_without_locks_still_works(
    corpus: CorpusConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("moe_dist.data.cache.fcntl.flock", refuse)
    assert len(prepare_data(corpus, SMALL_TOKENIZER).train) > 0
    assert "no locks" in caplog.text


def test_the_lock_excludes(tmp_path: Path) -> None:
    import fcntl

    with exclusive(tmp_path / "a.lock"), (tmp_path / "a.lock").open("a") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "a.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
