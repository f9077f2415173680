"""Near-duplicates across the split: found, reported, or left out."""

import random
from pathlib import Path

import pytest

from moe_dist.data import near_duplicates, prepare_data
from moe_dist.data.near_duplicates import near_duplicates as find
from moe_dist.errors import DataError
from tests.unit.data.samples import SMALL_TOKENIZER, documents_of, text_corpus

pytest.importorskip("datasketch", reason="needs moe-dist[dedup]")


def changed(text: str, words: int) -> str:
    """The text with that many of its words replaced."""
    parts = text.split()
    for at in random.Random(0).sample(range(len(parts)), words):
        parts[at] = "changed"
    return " ".join(parts)


def test_documents_with_a_few_other_words_are_found_in_any_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [text.split() for text in documents_of(0, 12)]
    others = [text.split() for text in documents_of(7, 12)]  # of other words
    near = changed(" ".join(held[4]), 1).split()  # at most 5 of 50 to 200 runs differ
    far = changed(" ".join(held[5]), len(held[5]) // 4).split()
    train = list(enumerate([*others, near, far, held[9]]))
    for batch in (100, 5):
        monkeypatch.setattr(near_duplicates, "BATCH", batch)
        assert sorted(find(held, lambda: iter(train))) == [12, 14]


def test_they_are_reported_or_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = text_corpus(tmp_path)
    held = tmp_path / "held.txt"
    held.write_text(changed((tmp_path / "007.txt").read_text(), 1))
    corpus = corpus.model_copy(update={"validation_paths": [str(held)]})
    plain = prepare_data(corpus, SMALL_TOKENIZER)
    assert plain.train.facts.documents == 60
    caplog.set_level("WARNING")
    report = corpus.model_copy(update={"near_duplicates": "report", "cache_dir": str(tmp_path / "other")})
    assert prepare_data(report, SMALL_TOKENIZER).sources[""].key == plain.sources[""].key
    assert "1 training documents are nearly equal to held-out ones, and stay" in caplog.text
    dropped = prepare_data(corpus.model_copy(update={"near_duplicates": "drop"}), SMALL_TOKENIZER)
    assert dropped.train.facts.documents == 59
    assert dropped.train.facts.bytes == plain.train.facts.bytes - len((tmp_path / "007.txt").read_bytes())
    only = tmp_path / "only.txt"
    only.write_text((tmp_path / "007.txt").read_text())
    update = {"paths": [str(only)], "near_duplicates": "drop"}
    with pytest.raises(DataError, match="holds only near-duplicates of held-out documents"):
        prepare_data(corpus.model_copy(update=update), SMALL_TOKENIZER)
