"""Division into chunks, and the choice of their number: properties, and cases whose answer is plain."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.dispatch.chunked_overlap import (
    CANDIDATES,
    Division,
    ExchangeSpeed,
    choose_chunks,
    predicted_seconds,
    shares,
)

COUNTS = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=4)
SECONDS = st.floats(0, 10)
SPEEDS = st.builds(ExchangeSpeed, SECONDS, SECONDS, SECONDS, SECONDS, st.floats(0, 1))
EVEN = ExchangeSpeed(latency=0, exchange=1, compute=1, chunk=0, hidden=1)


@given(COUNTS, st.integers(1, 5))
def test_shares_are_even_and_sum_to_the_counts(counts: list[list[int]], chunks: int) -> None:
    count_PL = torch.tensor(counts)
    share_CPL = shares(count_PL, chunks)
    assert share_CPL.shape == (chunks, *count_PL.shape)
    assert torch.equal(share_CPL.sum(0), count_PL)
    assert int((share_CPL.amax(0) - share_CPL.amin(0)).max()) <= 1


@given(COUNTS, st.integers(1, 5))
def test_chunks_hold_their_share_of_each_destination_in_order(counts: list[list[int]], chunks: int) -> None:
    """Against a loop that deals rows out."""
    count_PL = torch.tensor(counts)
    division = Division.of(count_PL, count_PL, chunks)
    rows = [(rank, kind, row) for rank, kinds in enumerate(counts) for kind, n in enumerate(kinds) for row in range(n)]
    dealt = []
    for chunk, share_PL in enumerate(shares(count_PL, chunks).tolist()):
        before_PL = shares(count_PL, chunks)[:chunk].sum(0).tolist()
        dealt.append(
            [
                (rank, kind, before_PL[rank][kind] + row)
                for rank, kinds in enumerate(share_PL)
                for kind, n in enumerate(kinds)
                for row in range(n)
            ]
        )
    number_R = division.reorder(torch.arange(len(rows)))
    assert [[rows[i] for i in part.tolist()] for part in division.split(number_R)] == dealt
    assert [sum(send) for send in division.send] == [len(chunk) for chunk in dealt]
    assert division.received_of == shares(count_PL, chunks).sum(1).tolist()


@given(SPEEDS)
def test_the_choice_is_the_fastest_unless_it_gains_next_to_nothing(speed: ExchangeSpeed) -> None:
    chosen = choose_chunks(speed)
    best = min(predicted_seconds(speed, chunks) for chunks in CANDIDATES)
    assert chosen in CANDIDATES
    assert chosen == 1 or predicted_seconds(speed, chosen) == best
    assert predicted_seconds(speed, chosen) <= best / 0.97 + 1e-12
    assert chosen == 1 or predicted_seconds(speed, chosen) < predicted_seconds(speed, 1)


@given(SPEEDS)
def test_nothing_to_hide_or_nothing_hidden_needs_no_chunks(speed: ExchangeSpeed) -> None:
    assert choose_chunks(replace(speed, hidden=0)) == 1
    assert choose_chunks(replace(speed, exchange=0)) == 1
    assert choose_chunks(replace(speed, compute=0, chunk=0)) == 1


def test_one_chunk_takes_all_of_both_and_many_the_longer_of_the_two() -> None:
    assert predicted_seconds(EVEN, 1) == pytest.approx(2 + 1 + 2 + 2)
    assert predicted_seconds(EVEN, 4) == pytest.approx(2 + 2.5)  # the wire is the longer; computation, backward
    assert predicted_seconds(replace(EVEN, hidden=0), 4) == predicted_seconds(EVEN, 1)


def test_overheads_and_latency_limit_the_number_of_chunks() -> None:
    long = replace(EVEN, compute=10)
    assert choose_chunks(long) == CANDIDATES[-1]
    assert choose_chunks(replace(long, chunk=0.1)) == 4
    assert choose_chunks(replace(long, chunk=0.3)) == 2
    assert choose_chunks(replace(EVEN, exchange=20, latency=0.1)) == 2
    assert choose_chunks(replace(long, chunk=1)) == 1


@pytest.mark.parametrize(("hidden", "chunks"), [(0.04, 1), (0.06, 8)])
def test_several_chunks_must_gain_two_in_a_hundred(hidden: float, chunks: int) -> None:
    """One chunk takes 2 + 1 and 2 + 2 seconds; eight hide at most 1 and 1.75 of them: gains of 0.11 and 0.165 of 7."""
    speed = ExchangeSpeed(latency=0, exchange=1, compute=1, chunk=0, hidden=hidden)
    assert predicted_seconds(speed, 1) == 7
    assert predicted_seconds(speed, 8) == pytest.approx(7 - 2.75 * hidden)
    assert choose_chunks(speed) == chunks
