"""The language of the house: docstrings open with a verb or a noun, class names are used once, no metaphors."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(path.parent.name for path in (ROOT / "moe_dist").glob("*/__init__.py"))
FRAGMENTS = frozenset(
    "what how where whether of as who which when why with from in that if to on by at for".split()  # noqa: SIM905
)
METAPHORS = re.compile(
    r"\b(hops?|hopping|travels?|travelled|departs?|departed|arrives?|arrived|lives|wish|wishes|home|homes|flight|"
    r"says|said|tells|told|knows|speaks|hears|heard|gives up|comes? to the same)\b"
)

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def sources(package: str) -> tuple[tuple[str, ast.Module], ...]:
    folder = ROOT / "moe_dist"
    files = sorted((folder / package).rglob("*.py")) if package else sorted(folder.glob("*.py"))
    return tuple((path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in files)


def docstrings(package: str) -> Iterator[tuple[str, str]]:
    for file, tree in sources(package):
        for node in ast.walk(tree):
            if isinstance(node, Documented) and (text := ast.get_docstring(node)):
                name = getattr(node, "name", "module")
                yield f"{file}:{getattr(node, 'lineno', 1)}: {name}", text
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{file}:{node.lineno}", node.value.value


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_docstrings_open_with_a_verb_or_a_noun(package: str) -> None:
    found = [
        f"{where}: {text.splitlines()[0]}"
        for where, text in docstrings(package)
        if text.split()[0].lower().strip(",.:;`") in FRAGMENTS
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_docstrings_use_no_private_metaphors(package: str) -> None:
    found = [
        f"{where}: {match.group()!r} in: {line.strip()}"
        for where, text in docstrings(package)
        for line in text.splitlines()
        if (match := METAPHORS.search(line))
    ]
    assert not found, "\n" + "\n".join(found)


def test_a_class_name_is_used_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for package in ("", *PACKAGES):
        for file, tree in sources(package):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    places[node.name.lstrip("_")].append(file)
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert not twice, "\n" + "\n".join(f"{name}: {', '.join(files)}" for name, files in twice.items())
