"""Cutting text into documents, and holding some of them out."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.data import documents as documents_module
from moe_dist.data.documents import (
    SECTION_CHARACTERS,
    Document,
    as_documents,
    in_parts,
    limit_bytes,
    normalize_lines,
    split_rows,
    split_stream,
    split_text,
)
from moe_dist.data.split import Split, Survey, lowest_keys
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


def test_a_single_document_is_divided_into_parts_at_line_ends() -> None:
    text = "".join(f"line {number}\n" for number in range(300))
    parts = list(in_parts(as_documents([text])))
    assert "".join(part.text for part in parts) == text
    assert 8 <= len(parts) <= 10
    assert all(part.text.endswith("\n") for part in parts)
    for whole in ([text, "another"], ["short"], []):
        assert list(in_parts(as_documents(whole))) == list(as_documents(whole))


def held_out_split(train: list[Document], fraction: float) -> Split:
    survey = Survey.of(train)
    return Split(lambda: iter(train), None, survey, lowest_keys(survey.keys, fraction))


@settings(deadline=None)
@given(TEXTS, st.floats(0.01, 0.99), st.randoms())
def test_held_out_documents_are_never_trained_on(texts: list[str], fraction: float, chance: object) -> None:
    documents = list(as_documents(texts))
    distinct = {d.digest for d in documents}
    if len(distinct) < 2:
        with pytest.raises(DataError, match="distinct document"):
            held_out_split(documents, fraction)
        return
    split = held_out_split(documents, fraction)
    train, validation = list(split.side("train")), list(split.side("validation"))
    assert sorted([*train, *validation]) == sorted(documents)
    held = {d.digest for d in validation}
    assert held.isdisjoint(d.digest for d in train)
    # the lowest digests, by hand
    assert held == set(sorted(distinct)[: min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)])
    chance.shuffle(documents)  # type: ignore[attr-defined]  # random.Random, whatever hypothesis calls it
    assert {d.digest for d in held_out_split(documents, fraction).side("validation")} == held


@settings(deadline=None)
@given(TEXTS, st.integers(1, 200))
def test_the_sample_is_the_training_text_in_the_order_of_its_digests(texts: list[str], limit: int) -> None:
    documents = list(as_documents(texts))
    if len({d.digest for d in documents}) < 2:
        return
    split = held_out_split(documents, 0.3)
    wanted = limit_bytes(sorted(split.side("train"), key=lambda document: document.digest), limit)
    assert [d.text for d in split.sample(limit)] == [d.text for d in wanted]


def test_duplicates_of_given_validation_documents_leave_the_training_side() -> None:
    def split_by(train: list[Document], held: list[Document]) -> tuple[list[str], list[str]]:
        keys = np.unique(Survey.of(held).keys)
        split = Split(lambda: iter(train), lambda: iter(held), Survey.of(train), keys)
        return [d.text for d in split.side("train")], [d.text for d in split.side("validation")]

    train = list(as_documents(["a", "b", "a", "c"]))
    held = list(limit_bytes(as_documents(["a", "b but longer", "c"]), 5))
    assert split_by(train, held) == (["b", "c"], ["a", "b bu"])
    whole: list[Document] = list(as_documents(["a", "b but longer"]))
    cut = list(limit_bytes(whole, 3))
    assert cut[1].text == "b "
    assert split_by(whole, cut) == ([], ["a", "b "])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 3), st.lists(st.integers(1, 300_000), max_size=6), st.booleans())
def test_a_text_is_split_alike_however_its_pieces_are_cut(kind: int, cuts: list[int], small: bool) -> None:
    """Pieces of 4 MiB are what is looked at; here they are made small."""
    text = {
        0: wikitext_like(60),
        1: "words without a blank line\n" * 9_000,
        2: "A sentence of some words. " * 9_000,
        3: "x" * 200_000 + "\n\n" + "y" * 90_000,
    }[kind]
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        whole = list(split_text(text))
        patch.setattr(documents_module, "_CHUNK", 20_000 if small or kind == 0 else 1)  # a title is in the first
        assert list(split_stream(pieces)) == whole
    assert "".join(whole) == text


def test_a_giant_article_is_cut_at_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "_CHUNK", 1000)
    monkeypatch.setattr(documents_module, "_LONGEST_ARTICLE", 5000)
    text = " = Title = \n \n" + "a line of text\n" * 1000
    pieces = list(split_stream([text[at : at + 700] for at in range(0, len(text), 700)]))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert all(len(piece) <= 6000 and piece.endswith("\n") for piece in pieces)


def test_blank_texts_are_no_documents_and_surrogates_are_replaced() -> None:
    assert [d.text for d in as_documents(["", " \n", "a\ud800b"])] == ["a?b"]
