"""Best-fit packing: whole documents by hand, against the definition, and in token files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.data import packing
from moe_dist.data.inspection import report_of
from moe_dist.data.packing import PackedSequences, pack
from moe_dist.data.token_file import TokenFile, open_token_file
from tests.unit.data.samples import write_token_file

END = 1


class Numbers:
    """Tokenizer of texts of numbers."""

    vocab_size, end_of_document = 1000, END

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]


def token_file(path: Path, *documents: list[int]) -> TokenFile:
    write_token_file(path, [" ".join(map(str, document)) for document in documents], Numbers())  # type: ignore[arg-type]
    return open_token_file(path)


def test_pieces_go_where_the_least_room_is_left() -> None:
    order, counts = pack(np.array([2, 6, 5, 1, 3, 4]), 8)
    bins = [part.tolist() for part in np.split(order, np.cumsum(counts))[:-1]]
    assert bins == [[1, 0], [2, 4], [5, 3]]  # 6 + 2, 5 + 3, 4 + 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_no_bin_overflows_and_each_piece_is_in_one(sizes: list[int]) -> None:
    order, counts = pack(np.array(sizes), 12)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    filled = [sum(sizes[piece] for piece in part) for part in np.split(order, np.cumsum(counts))[:-1]]
    assert max(filled) <= 12
    # two bins that are half empty would have been one
    assert sum(each <= 6 for each in filled) <= 1


def test_sequences_hold_whole_documents_and_padding_without_loss(tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "train.tokens", [11, 12], [21, 22, 23, 24, 25, 26, 27, 28], [31], [41, 42, 43])
    sequences = PackedSequences(tokens, 5)  # six ids a sequence; the second document is cut at its sixth id
    rows = sequences.read(np.arange(len(sequences))).tolist()
    assert rows == [
        [21, 22, 23, 24, 25, 26],
        [26, 27, 28, END, ~END, ~END],
        [41, 42, 43, END, 31, END],
        [11, 12, END, ~END, ~END, ~END],
    ]
    assert sequences.read(np.array([2, 0])).tolist() == [rows[2], rows[0]]
    targets = sum(token >= 0 for row in rows for token in row[1:])
    assert sequences.target_share == targets / (4 * 5)
    report = report_of(tokens, sequences, 5)
    assert (report.sequences, report.cut_documents) == (4, 1 / 4)
    assert report.padding == pytest.approx(5 / 24)


def test_an_index_is_kept_made_again_when_damaged_and_the_same_in_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(2, 999, size).tolist() for size in random.integers(0, 40, 200)]
    tokens = token_file(tmp_path / "train.tokens", *documents)
    PackedSequences(tokens, 16)
    index = tmp_path / "train.packing-16"
    content = index.read_bytes()
    monkeypatch.setattr(packing, "write_packing", None)
    first = PackedSequences(tokens, 16)
    monkeypatch.undo()
    index.unlink()  # `first` has mapped it, and keeps the file
    for damaged in (content[:-8], content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]):
        index.unlink(missing_ok=True)
        index.write_bytes(damaged)
        PackedSequences(tokens, 16)
        assert index.read_bytes() == content
    monkeypatch.setattr(packing, "WINDOW", 20)
    monkeypatch.setattr("moe_dist.data.token_file._RUN", 64)
    index.unlink()
    windows = PackedSequences(tokens, 16)
    assert windows.facts.documents == first.facts.documents == 200
    for sequences in (first, windows):
        rows = sequences.read(np.arange(len(sequences)))
        kept = [row[row >= 0].tolist() for row in rows]
        assert sum(map(len, kept)) == sequences.facts.tokens
        assert sequences.facts.padding < 0.2
        whole = [[*document, END] for document in documents if len(document) < 17]
        joined = [f" {' '.join(map(str, row))} " for row in kept]
        assert all(any(f" {' '.join(map(str, document))} " in row for row in joined) for document in whole)
