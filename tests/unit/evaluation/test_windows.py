"""Sliding windows over a text: what is scored, with which context, by which rank."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.evaluation.windows import window_batches, window_count


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    length = draw(st.integers(1, 12))
    return (
        draw(st.integers(2, 60)),
        length,
        draw(st.integers(1, length)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
    )


@given(cases())
def test_every_token_is_scored_once_with_the_context_that_the_stride_leaves(
    case: tuple[int, int, int, int, int],
) -> None:
    tokens, length, stride, ranks, batch = case
    ids, scored = np.arange(tokens) + 1000, []
    shapes = []
    for rank in range(ranks):
        own = list(window_batches(ids, length, stride, rank, ranks, batch))
        shapes.append([window.sequence_bS.shape for window in own])
        for window in own:
            for row, marks in zip(window.sequence_bS.tolist(), window.scored_bS.tolist(), strict=True):
                for place in np.flatnonzero(marks):
                    context = row[: place + 1]
                    assert context == list(range(row[0], row[0] + len(context)))  # a run of the text
                    assert len(context) >= min(row[place + 1] - 1000, length - stride + 1)
                    scored.append(row[place + 1] - 1000)
    assert sorted(scored) == list(range(1, tokens))
    assert all(shape == shapes[0] for shape in shapes)


def test_the_number_of_windows() -> None:
    assert [window_count(tokens, 4, 2) for tokens in (2, 5, 6, 7, 8)] == [1, 1, 2, 2, 3]
    assert window_count(10, 3, 3) == 3


def test_a_small_text_by_hand() -> None:
    """Seven tokens, windows of four, stride two: the second window repeats two tokens as context."""
    (window,) = window_batches(np.array([9, 1, 2, 3, 4, 5, 6]), 4, 2, 0, 1, 8)
    assert window.sequence_bS.tolist() == [[9, 1, 2, 3, 4], [2, 3, 4, 5, 6]]
    assert window.scored_bS.tolist() == [[True] * 4, [False, False, True, True]]
