"""A preparation that is shared, or was killed, leaves the same bytes; memory does not grow with the text."""

import contextlib
import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_dist.config import CorpusConfig
from moe_dist.data import encode as module
from moe_dist.data.compressed import text_chunks
from moe_dist.data.corpora import open_corpus
from moe_dist.data.plan import PLAN
from moe_dist.data.prepare import prepare_data
from moe_dist.data.tokenizer import SentencePieceTokenizer
from moe_dist.errors import DataError
from tests.unit.data.samples import SMALL_TOKENIZER, documents_of, sides_of, text_corpus

FINISHED = ["manifest.json", "tokenizer.model", "train.tokens", "validation.tokens"]


class Killed(BaseException):
    """End of the process, as far as files are concerned."""


def token_bytes(corpus: CorpusConfig) -> list[bytes]:
    data = prepare_data(corpus, SMALL_TOKENIZER)
    return [data.train.path.read_bytes(), data.validation.path.read_bytes(), data.tokenizer_path.read_bytes()]


def files_in(corpus: CorpusConfig) -> list[str]:
    (folder,) = Path(corpus.cache_dir).glob("prepared/*/")
    return sorted(path.name for path in folder.iterdir())


def kill_after(documents: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the encoding end after some documents; returns the texts that are encoded."""
    encoded: list[str] = []
    encode_all = SentencePieceTokenizer.encode_all

    def limited(self: SentencePieceTokenizer, texts: Iterator[str]) -> Iterator[list[int]]:
        for text in texts:
            if len(encoded) == documents:
                raise Killed
            encoded.append(text)
            yield from encode_all(self, [text])

    monkeypatch.setattr(SentencePieceTokenizer, "encode_all", limited)
    return encoded


@pytest.mark.parametrize("killed_after", [1, 10, 59])
def test_a_killed_preparation_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = text_corpus(tmp_path)
    wanted = token_bytes(corpus)
    again = corpus.model_copy(update={"cache_dir": str(tmp_path / "other cache")})
    monkeypatch.setattr(module, "PIECE_BYTES", 3_000)
    with monkeypatch.context() as patch:
        first = kill_after(killed_after, patch)
        with pytest.raises(Killed):
            prepare_data(again, SMALL_TOKENIZER)
    with monkeypatch.context() as patch:
        second = kill_after(10**9, patch)
        patch.setattr("moe_dist.data.corpora.Survey.of", None)  # the corpus is not read again to decide its split
        assert token_bytes(again) == wanted
    lost = len(first) + len(second) - 60
    assert 0 <= lost <= 10  # documents of 300 to 1,000 bytes: at most one piece is encoded twice
    assert killed_after < 10 or len(second) < 60
    assert files_in(again) == FINISHED


@pytest.mark.parametrize("damage", ["half a line", "another tokenizer", "a changed token", "no plan", "half a plan"])
def test_what_cannot_go_on_is_made_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = text_corpus(tmp_path)
    wanted = token_bytes(corpus)
    again = corpus.model_copy(update={"cache_dir": str(tmp_path / "other cache")})
    monkeypatch.setattr(module, "PIECE_BYTES", 3_000)
    with monkeypatch.context() as patch:
        kill_after(30, patch)
        with pytest.raises(Killed):
            prepare_data(again, SMALL_TOKENIZER)
    (state,) = (tmp_path / "other cache").glob("prepared/*/pieces/000001.json")
    tokens, plan = state.with_suffix(".train.tokens"), state.parent.parent / PLAN
    path = {"a changed token": tokens, "no plan": plan, "half a plan": plan}.get(damage, state)
    content = path.read_bytes()
    changed = {
        "half a line": content[:40],
        "another tokenizer": content.replace(b'"identity": "', b'"identity": "0'),
        "a changed token": content[:-1] + b"x",
        "half a plan": content[:100],
    }
    path.unlink()
    if damage in changed:
        path.write_bytes(changed[damage])
    assert token_bytes(again) == wanted
    assert files_in(again) == FINISHED


def test_machines_share_a_corpus_and_take_over_what_a_killed_one_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three machines (threads with names of their own), of which one ends in the middle of its first piece."""
    corpus = text_corpus(tmp_path)
    wanted = token_bytes(corpus)
    again = corpus.model_copy(update={"cache_dir": str(tmp_path / "other cache")})
    monkeypatch.setattr(module, "PIECE_BYTES", 3_000)
    monkeypatch.setattr("moe_dist.data.prepare.gethostname", lambda: threading.current_thread().name)
    encode_all, encoded = SentencePieceTokenizer.encode_all, dict[str, list[str]]()
    killed, all_work = threading.Event(), threading.Barrier(3)

    def shared(self: SentencePieceTokenizer, texts: Iterator[str]) -> Iterator[list[int]]:
        name = threading.current_thread().name
        if name not in encoded:
            encoded[name] = []
            all_work.wait(60)  # each has a piece of its own
            if name == "killed":
                killed.set()
                raise Killed
            killed.wait(60)
        for text in texts:
            encoded[name].append(text)
            yield from encode_all(self, [text])

    def prepare() -> None:
        with contextlib.suppress(Killed):
            prepare_data(again, SMALL_TOKENIZER)

    monkeypatch.setattr(SentencePieceTokenizer, "encode_all", shared)
    threads = [threading.Thread(target=prepare, name=name) for name in ("first", "second", "killed")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name: bool(texts) for name, texts in encoded.items()} == {"first": True, "second": True, "killed": False}
    assert len(encoded["first"]) + len(encoded["second"]) == 60
    monkeypatch.setattr(SentencePieceTokenizer, "encode_all", None)
    assert token_bytes(again) == wanted
    assert files_in(again) == FINISHED


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.gz", ".jsonl.zst", ".txt.zst"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path, suffix: str) -> None:
    import pyarrow

    texts = list(documents_of(3, 40))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts) if "jsonl" in suffix else texts[0] * 400
    kind = {".gz": "gzip", ".zst": "zstd"}[Path(suffix).suffix]
    plain, packed = tmp_path / f"plain{Path(suffix).stem}", tmp_path / f"packed{suffix}"
    plain.write_text(lines)
    with pyarrow.output_stream(str(packed), compression=kind) as file:
        file.write(lines.encode())
    one, other = (sides_of(open_corpus(CorpusConfig(kind="text", paths=[str(path)]))) for path in (plain, packed))
    assert other == one


def test_a_damaged_or_unknown_compression_is_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(b"some words of text\n" * 3000)
    for name, content in (
        ("cut.txt.gz", whole[:40]),
        ("none.txt.gz", b"no gzip at all"),
        ("none.jsonl.zst", b"no zstd"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be read: ") as caught:
            sides_of(open_corpus(CorpusConfig(kind="text", paths=[str(tmp_path / name)])))
        assert "\n" not in str(caught.value)
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the supported formats: .*\.txt\.gz"):
        open_corpus(CorpusConfig(kind="text", paths=[str(tmp_path / "a.parquet.gz")]))


@pytest.mark.parametrize("place", [0, 5, (1 << 20) - 2, 1 << 20, (1 << 20) + 7])
def test_the_first_wrong_byte_is_named(tmp_path: Path, place: int) -> None:
    data = bytearray(("é" * (1 << 20)).encode())
    data[place] = 0xFF
    (tmp_path / "a.txt").write_bytes(data)
    # a byte 0xff after a lead byte: the lead byte is the wrong one, as Python says
    wrong = place if place % 2 == 0 else place - 1
    with pytest.raises(DataError, match=rf"a\.txt is not UTF-8 text: byte {wrong} is 0x"):
        list(text_chunks(tmp_path / "a.txt"))
    (tmp_path / "cut.txt").write_bytes("é".encode() * 10 + b"\xc3")
    with pytest.raises(DataError, match=r"cut\.txt is not UTF-8 text: byte 20 is 0xc3"):
        list(text_chunks(tmp_path / "cut.txt"))


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from moe_dist.config import CorpusConfig, TokenizerConfig
from moe_dist.data import prepare_data
folder = Path(sys.argv[1])
config = CorpusConfig(kind="text", paths=[str(folder / "a.txt")], cache_dir=str(folder / "cache"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = prepare_data(config, TokenizerConfig(vocab_size=300, train_bytes=100_000))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, data.train.facts.bytes)
"""
    paragraph = "".join(documents_of(1, 40)) + "\n\n"
    with (tmp_path / "a.txt").open("w") as file:
        for number in range(120_000_000 // len(paragraph)):
            file.write(f"{number}\n{paragraph}")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, size = map(float, run.stdout.split())
    assert size > 100_000_000
    assert grown < 110  # MiB for 115 MiB of text: two pieces of it, a batch of documents and its tokens
