"""`moe-dist data validate`: one line a check, and the exit code."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_dist import cli
from moe_dist.config import CorpusConfig, TokenizerConfig
from moe_dist.data import prepare_data
from moe_dist.data.corpora import open_corpus
from moe_dist.data.packing import PackedSequences
from moe_dist.data.prepared_checks import _check_documents, _check_duplicates, _check_ids, check_across, check_folder
from moe_dist.data.token_file import TokenFacts, TokenFile
from tests.unit.data.samples import SMALL_TOKENIZER, documents_of, hf_tokenizer, sides_of, text_corpus

END = 1


def lines(arguments: list[str]) -> tuple[int, list[str]]:
    result = CliRunner().invoke(cli.app, ["data", "validate", *arguments])
    return result.exit_code, result.output.splitlines()


def test_a_good_folder_has_no_failures_and_a_damaged_one_fails(tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="needs moe-dist[dedup]")
    data = prepare_data(text_corpus(tmp_path), SMALL_TOKENIZER)
    PackedSequences(data.train, 16)
    code, shown = lines([str(tmp_path / "cache"), "--near-duplicates"])
    assert code == 0
    assert shown[0] == str(data.train.path.parent)
    assert {line.split()[0] for line in shown[1:]} == {"ok"}
    assert f"  ok   train.tokens: largest id {data.train.ids.max()} of a vocabulary of 400" in shown
    assert sum("packing-16" in line and "padding" in line for line in shown) == 1
    assert "  ok   0 training documents are near-duplicates of validation documents" in shown
    content = bytearray(data.train.path.read_bytes())
    content[-3] ^= 1
    data.train.path.unlink()
    data.train.path.write_bytes(content)
    code, shown = lines([str(data.train.path.parent)])
    assert code == 1
    assert shown[1].startswith("  fail token file")
    (data.train.path.parent / "manifest.json").unlink()
    assert [finding.level for finding in check_folder(data.train.path.parent, near=False)] == ["fail"]


def tokens_of(*ids: int, documents: int, vocab_size: int = 50) -> TokenFile:
    facts = TokenFacts(len(ids), documents, 1, 1, 1, vocab_size, END, "<u2")
    return TokenFile(Path("train.tokens"), facts, 0, np.array(ids, "<u2"))


def test_ids_and_documents_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.data.prepared_checks.GIANT", 3)
    good = tokens_of(5, END, END, 5, 49, 7, END, documents=3)
    assert [finding.level for finding in _check_ids(good)] == ["ok"]
    assert [(finding.level, finding.text) for finding in _check_documents(good)] == [
        ("ok", "train.tokens: 3 documents, the longest of 4 tokens"),
        ("warn", "1 documents of train.tokens are empty"),
        ("warn", "1 documents of train.tokens have more than 3 tokens"),
    ]
    bad = tokens_of(5, END, 60, documents=2)
    assert [finding.level for finding in _check_ids(bad)] == ["fail", "fail"]
    assert next(iter(_check_documents(bad))).text == "train.tokens: 1 documents end, the header says 2"


def test_duplicates_by_hand() -> None:
    train, held = np.array([3, 4, 3, 5], np.uint64), np.array([5, 9], np.uint64)
    assert [(finding.level, finding.text) for finding in _check_duplicates(train, held)] == [
        ("warn", "1 training documents repeat another"),
        ("warn", "1 training documents are validation documents too"),
    ]


def test_a_folder_without_prepared_text_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["data", "validate", str(tmp_path)])
    assert result.exit_code
    assert "is no prepared folder" in str(result.exception)


def test_documents_that_sources_share_are_counted(tmp_path: Path) -> None:
    texts, sides, folders = list(documents_of(0, 60)), [], []
    tokenizer = TokenizerConfig(kind="hf", path=str(hf_tokenizer(tmp_path / "hf")), vocab_size=300)
    for name, held, own in (("a", 0.1, texts[:40]), ("b", 0.4, texts[10:])):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
        paths = [str(rows)]
        corpus = CorpusConfig(kind="text", paths=paths, cache_dir=str(tmp_path / "cache"), validation_fraction=held)
        sides.append([{document.text for document in side} for side in sides_of(open_corpus(corpus))])
        folders.append(prepare_data(corpus, tokenizer).train.path.parent)
    (train_a, held_a), (train_b, held_b) = sides
    leaked, leaked_back, shared = (len(x & y) for x, y in ((train_a, held_b), (train_b, held_a), (train_a, train_b)))
    assert min(leaked, shared) > 5
    found = {(names, finding.text): finding.level for names, finding in check_across(folders)}
    one, other = (folder.name for folder in folders)
    first, second = sorted((one, other))
    leak = "training documents of the first are validation documents of the second"
    assert found == {
        (f"{one}, {other}", f"{leaked} {leak}"): "warn",
        (f"{other}, {one}", f"{leaked_back} {leak}"): "warn" if leaked_back else "ok",
        (f"{first}, {second}", f"{shared} training documents of the first are training documents of both"): "warn",
    }
    code, shown = lines([str(tmp_path / "cache")])
    assert code == 0
    assert f"  warn {leaked} {leak}" in shown
