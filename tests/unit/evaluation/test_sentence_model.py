"""Sentences as a model is given them, and the schedule it learns them by."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.evaluation.fine_tune import FineTuning
from moe_dist.evaluation.glue_data import Example
from moe_dist.evaluation.sentence_model import EXTRA_COLUMNS, Encoded, _cut, encode, pack


class Letters:
    """Every character is a token."""

    end_of_document = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def _text(tokens: list[int]) -> str:
    return "".join(chr(token) if token else "|" for token in tokens)


def test_sentences_stand_between_ends_of_documents() -> None:
    letters = Letters()
    one, two = Example(("abc",), 1.0), Example(("abcdef", "xyz"), 2.5)
    assert _text(encode(one, letters, 99).tokens) == "|abc|"  # type: ignore[arg-type]
    assert _text(encode(two, letters, 99).tokens) == "|abcdef\nxyz|"  # type: ignore[arg-type]
    assert _text(encode(two, letters, 10).tokens) == "|abcd\nxyz|"  # type: ignore[arg-type]  # the longer one is cut
    assert _text(encode(two, letters, 7).tokens) == "|ab\nxy|"  # type: ignore[arg-type]
    assert encode(two, letters, 7).label == 2.5  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=2), st.integers(-3, 80))
def test_a_cut_fills_the_room_and_takes_from_the_longest(lengths: list[int], room: int) -> None:
    cut = _cut(list(lengths), room)
    assert sum(cut) == min(sum(lengths), max(0, room))
    shortened = [new for old, new in zip(lengths, cut, strict=True) if new < old]
    assert all(new <= old for old, new in zip(lengths, cut, strict=True))
    assert not shortened or max(cut) - min(shortened) <= 1


def test_a_packed_batch_keeps_lengths_and_labels_exactly() -> None:
    packed = pack([Encoded([0, 7, 0], 3.8), Encoded([0, 1, 2, 3, 0], 1.0)], 6)
    assert packed[:, :-EXTRA_COLUMNS].tolist() == [[0, 7, 0, 0, 0, 0], [0, 1, 2, 3, 0, 0]]
    assert packed[:, -EXTRA_COLUMNS].tolist() == [2, 4]
    assert packed[:, -1].view(torch.float64).tolist() == [3.8, 1.0]


def test_the_schedule_rises_falls_and_is_bounded() -> None:
    how = FineTuning(epochs=2.0, batch=10, max_steps=100)
    assert (how.steps(200), how.steps(10_000), how.steps(1)) == (40, 100, 1)
    rates = [how.rate(step, 40, 1.0) for step in range(1, 41)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 36 / 37]
    assert 0 < rates[-1] < 0.03
    assert how.rate(1, 1, 1.0) == 1.0
