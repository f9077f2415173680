"""Cutting text into documents, and holding some of them out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.data.documents import (
    SECTION_CHARACTERS,
    Document,
    as_documents,
    drop_held_out,
    hold_out,
    limit_bytes,
    normalize_lines,
    split_rows,
    split_text,
)
from moe_dist.errors import DataError
from tests.unit.data.samples import wikitext_article, wikitext_like

LINES = st.sampled_from(
    ["\n", " \n", " = Title = \n", " = = Section = = \n", " = Played , W = \n", "Some words .\n", "x"]
)
TEXTS = st.lists(st.text(max_size=12) | st.sampled_from(["one", "two", "three"]), max_size=30)


@settings(deadline=None)
@given(st.lists(LINES).map("".join) | st.text())
def test_documents_of_a_text_joined_are_the_text(text: str) -> None:
    assert "".join(split_text(text)) == text


def test_sections_end_at_blank_lines_and_lines() -> None:
    paragraph = "words and words\n" * 40 + "\n"
    sections = list(split_text(paragraph * 200))
    assert len(sections) > 3
    assert all(section.endswith("\n\n") for section in sections)
    assert all(len(section) < SECTION_CHARACTERS + 2 * len(paragraph) for section in sections)
    dense = list(split_text("words without a blank line\n" * 20_000))
    assert len(dense) > 3
    assert all(text.endswith("line\n") for text in dense)


def test_wikitext_lines_become_articles_from_text_and_from_rows() -> None:
    articles = [" = One = \n \n Text . \n \n = = Part = = \n \n = Played , W = \n \n", " = Two = \n \n Text . \n"]
    articles[0] = articles[0].replace(" \n = Played", " = Played")
    assert list(split_text("".join(articles))) == articles
    # the hub gives WikiText a line a row, and blank lines as empty rows
    rows = ["" if line == " " else line + "\n" for line in "".join(articles).split("\n")[:-1]]
    assert [text.count("\n") for text in split_rows(rows)] == [text.count("\n") for text in articles]
    assert list(split_rows(["a row", "another row"])) == ["a row", "another row"]


def test_every_article_of_a_text_like_wikitext_is_a_document() -> None:
    """As in WikiText-2's files: sections, tables, formulas and unknown words inside of articles, ragged blank lines."""
    assert list(split_text(wikitext_like(120))) == [wikitext_article(number) for number in range(120)]
    assert wikitext_like(120).count(" = ") > 1000  # of which 120 begin an article


def test_line_ends_of_other_systems_give_the_same_documents() -> None:
    text = wikitext_like(120)
    for line_end in ("\r\n", "\r"):
        assert normalize_lines(text.replace("\n", line_end)) == text
    assert normalize_lines("\ufeff" + text) == text
    assert normalize_lines("a\r\r\nb\n\rc\ufeff") == "a\n\nb\n\nc\ufeff"


def test_a_long_line_is_cut_at_sentences_words_or_length() -> None:
    """A sentence of 50 characters ends at multiples of 50: the first after 16,384 is at 16,400."""
    sentence = "The quick brown fox jumps over the lazy dogs now. "
    assert len(sentence) == 50
    sections = list(split_text(sentence * 3600))
    assert [len(section) for section in sections] == [16_400] * 10 + [16_000]
    words = list(split_text("word " * 36_000))  # 180,000 characters; words end at multiples of 5
    assert [len(section) for section in words] == [16_385] * 10 + [16_150]
    assert [len(section) for section in split_text("x" * 180_000)] == [32_768] * 5 + [16_160]
    chinese = list(split_text(("\u5b57" * 99 + "\u3002") * 400))  # 40,000 characters without a space
    assert [len(section) for section in chinese] == [16_400, 16_400, 7_200]


@settings(deadline=None)
@given(TEXTS, st.integers(1, 200))
def test_limit_keeps_a_prefix_of_at_most_that_many_bytes(texts: list[str], limit: int) -> None:
    documents = list(as_documents(texts))
    kept = list(limit_bytes(documents, limit))
    joined, whole = (b"".join(d.text.encode() for d in some) for some in (kept, documents))
    assert whole.startswith(joined)
    assert len(joined) <= limit
    assert len(joined) > limit - 4 or len(joined) == len(whole)
    # a cut document is still known by the digest of the whole
    assert [d.digest for d in kept] == [d.digest for d in documents[: len(kept)]]


@settings(deadline=None)
@given(TEXTS, st.floats(0.01, 0.99), st.randoms())
def test_held_out_documents_are_never_trained_on(texts: list[str], fraction: float, chance: object) -> None:
    documents = list(as_documents(texts))
    distinct = {d.digest for d in documents}
    if len(distinct) < 2:
        with pytest.raises(DataError, match="distinct document"):
            hold_out(documents, fraction)
        return
    train, validation = hold_out(documents, fraction)
    assert sorted([*train, *validation]) == sorted(documents)
    held = {d.digest for d in validation}
    assert held.isdisjoint(d.digest for d in train)
    assert len(held) == min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    chance.shuffle(documents)  # type: ignore[attr-defined]  # random.Random, whatever hypothesis calls it
    assert {d.digest for d in hold_out(documents, fraction).validation} == held


def test_duplicates_of_given_validation_documents_leave_the_training_side() -> None:
    train = list(as_documents(["a", "b", "a", "c"]))
    held = list(limit_bytes(as_documents(["a", "b but longer", "c"]), 5))
    assert [d.text for d in drop_held_out(train, held).train] == ["b", "c"]
    whole: list[Document] = list(as_documents(["a", "b but longer"]))
    cut = list(limit_bytes(whole, 3))
    assert cut[1].text == "b "
    assert drop_held_out(whole, cut).train == []


def test_blank_texts_are_no_documents_and_surrogates_are_replaced() -> None:
    assert [d.text for d in as_documents(["", " \n", "a\ud800b"])] == ["a?b"]
