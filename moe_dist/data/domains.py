"""Corpus of four distinct domains in equal parts, generated from the standard library and a seed.

english   docstrings of the standard library, or a given text
code      the standard library's source without docstrings and comments
cyrillic  other English text with Cyrillic letters
tables    lines of random names, dates and numbers, separated by commas
"""

import ast
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moe_dist.data.files import FileSource, stdlib_source
from moe_dist.errors import DataError

DOMAINS = ("english", "code", "cyrillic", "tables")
DOCUMENT_CHARACTERS = 2_000
TRAIN = "train.jsonl"
_CYRILLIC = str.maketrans(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "абцдефгхийклмнопщрстувшжызАБЦДЕФГХИЙКЛМНОПЩРСТУВШЖЫЗ"
)
_GOODS = ("bolt", "cable", "drill", "filter", "gasket", "hinge", "lamp", "motor", "nozzle", "pump", "relay", "valve")


def write_domains(
    folder: Path, seed: int, characters: int, validation: float = 0.1, english: Path | None = None
) -> Mapping[str, Path]:
    """Write one file of shuffled training documents and one of held-out documents per domain (JSON lines).

    Args:
        characters: characters per domain.
        validation: share of a domain's documents that is held out.
        english: text file for the two domains of English origin; None: docstrings.

    Returns:
        Held-out file of each domain; the training documents are in `folder / TRAIN`.

    Raises:
        DataError: a domain has too little text.
    """
    draw = random.Random(seed)
    documents = _documents(seed, characters, english)
    held, train = {}, []
    folder.mkdir(parents=True, exist_ok=True)
    for domain, texts in documents.items():
        draw.shuffle(texts)
        count = max(1, round(validation * len(texts)))
        held[domain] = folder / f"validation-{domain}.jsonl"
        _write(held[domain], ({"domain": domain, "text": text} for text in texts[:count]))
        train += [{"domain": domain, "text": text} for text in texts[count:]]
    draw.shuffle(train)
    _write(folder / TRAIN, train)
    return held


def _documents(seed: int, characters: int, english: Path | None) -> dict[str, list[str]]:
    source = _docstrings() if english is None else FileSource((english,), "text").texts()
    prose = _cut("english", source, 2 * characters)
    return {
        "english": prose[::2],
        "code": _cut("code", _code(), characters),
        "cyrillic": [text.translate(_CYRILLIC) for text in prose[1::2]],
        "tables": _cut("tables", _tables(random.Random(f"tables {seed}")), characters),
    }


def _cut(domain: str, texts: Iterable[str], characters: int) -> list[str]:
    """Cut the texts, in order, into documents of equal length."""
    count, found, rest = max(2, characters // DOCUMENT_CHARACTERS), [], ""
    for text in texts:
        rest += text + "\n"
        while len(rest) >= DOCUMENT_CHARACTERS:
            found.append(rest[:DOCUMENT_CHARACTERS])
            rest = rest[DOCUMENT_CHARACTERS:]
            if len(found) == count:
                return found
    raise DataError(
        f"domain {domain!r} has {len(found) * DOCUMENT_CHARACTERS:,} characters, {characters:,} are asked for: ask for "
        "fewer" + (", or give a longer English text" if domain == "english" else "")
    )


def _modules() -> Iterator[ast.Module]:
    for text in stdlib_source().texts():
        try:
            yield ast.parse(text)
        except (SyntaxError, ValueError):  # the library holds files that are wrong on purpose, for its own tests
            continue


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(module: ast.Module) -> Iterator[tuple[Documented, str]]:
    """Yield the nodes that have a docstring, and the docstring."""
    for node in ast.walk(module):
        if isinstance(node, Documented):
            text = ast.get_docstring(node)
            if text is not None:
                yield node, text


def _docstrings() -> Iterator[str]:
    for module in _modules():
        yield from (text for _, text in _documented(module) if len(text) > 80)


def _code() -> Iterator[str]:
    for module in _modules():
        for node, _ in _documented(module):
            node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(module)  # comments are not in the tree


def _tables(draw: random.Random) -> Iterator[str]:
    while True:
        yield (
            f"{draw.randrange(10_000):04d},{draw.choice(_GOODS)}-{draw.randrange(100)},"
            f"{draw.randrange(1990, 2030)}-{draw.randrange(1, 13):02d}-{draw.randrange(1, 29):02d},"
            f"{draw.lognormvariate(3, 1):.2f},{draw.randrange(500)}"
        )


def _write(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
