"""The mixture of domains: equal parts, the same for one seed, nothing on both sides."""

import json
from pathlib import Path

import pytest

from moe_dist.data.domains import DOCUMENT_CHARACTERS, DOMAINS, TRAIN, write_domains
from moe_dist.errors import DataError

CHARACTERS = 10 * DOCUMENT_CHARACTERS


def _rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("english") / "english.txt"
    file.write_text("\n\n".join(f"The {n}th line tells of number {n * n}." for n in range(2_000)))
    return file


def test_the_domains_are_equal_parts_and_held_out_documents_are_not_trained_on(tmp_path: Path, english: Path) -> None:
    held = write_domains(tmp_path, 0, CHARACTERS, validation=0.2, english=english)
    train = _rows(tmp_path / TRAIN)
    assert list(held) == list(DOMAINS)
    for domain in DOMAINS:
        own, kept = [row for row in train if row["domain"] == domain], _rows(held[domain])
        assert (len(own), len(kept)) == (8, 2)
        assert {len(row["text"]) for row in own + kept} == {DOCUMENT_CHARACTERS}
        assert {row["text"] for row in own}.isdisjoint(row["text"] for row in kept)
    assert [row["domain"] for row in train] != sorted(row["domain"] for row in train)


def test_each_domain_is_what_its_name_says(tmp_path: Path, english: Path) -> None:
    held = write_domains(tmp_path, 0, CHARACTERS, english=english)
    text = {domain: "".join(row["text"] for row in _rows(file)) for domain, file in held.items()}
    assert "tells of number" in text["english"]
    assert "def " in text["code"]
    assert "теллс оф" in text["cyrillic"]
    assert not any("a" <= character <= "z" for character in text["cyrillic"])
    assert all(line.count(",") == 4 for line in text["tables"].splitlines()[1:-1])


def test_one_seed_makes_one_corpus(tmp_path: Path, english: Path) -> None:
    def written(seed: int, name: str) -> bytes:
        write_domains(tmp_path / name, seed, CHARACTERS, english=english)
        return (tmp_path / name / TRAIN).read_bytes()

    assert written(3, "a") == written(3, "b") != written(4, "c")


def test_too_little_text_is_refused(tmp_path: Path, english: Path) -> None:
    with pytest.raises(DataError, match=r"domain 'english' has .* characters, 10,000,000 are asked for"):
        write_domains(tmp_path, 0, 5_000_000, english=english)
