"""Damage of valid input, bytes and structure, and the property that readers keep whatever they get."""

import copy
import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from moe_dist.errors import MoeDistError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10000"))
LIMIT_SECONDS = 60
"""Time after which a reader counts as hanging; thousands of times what one takes."""

Value = TypeVar("Value")
ODD_TEXTS = (
    "", " ", "\n", "a\nb", "\r", "\x00", "\u2028", "\ufeff", "\ud800", "é", "9" * 5000, "-1", "1e999", "nan", "0x1F",
    "1_000", "2024-99-99", "12:99:99", "~", "!!python/object:os.system", "*a", "&a", "[", "{", "<<", "None", "true",
    "../../etc/passwd", "/dev/null", "slots=0", "4(x999999999999)", "٣", "²",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), [], {}, [[]], [None], {"": None}, {"a\nb": 1}, *ODD_TEXTS,
)  # fmt: skip


def fuzzed(share: float = 1.0) -> settings:
    """Return settings of a fuzz test with this share of the examples."""
    return settings(
        max_examples=max(1, round(share * EXAMPLES)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def _time_limit() -> Any:
    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reads(read: Callable[[], Value]) -> Value | None:
    """Return the value, or None after an error for the user, which must be one line; other exceptions are raised."""
    try:
        with _time_limit():
            return read()
    except MoeDistError as error:
        text, kind = str(error), type(error).__name__
    assert text.strip(), f"{kind} without a message"
    assert len(text.splitlines()) == 1, f"more than one line: {text!r}"
    return None


@st.composite
def bytes_like(draw: st.DrawFn, valid: bytes, words: Sequence[str] = ()) -> bytes:
    """Return valid bytes with a few edits: removed, repeated, exchanged or inserted parts; now and then anything."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(valid)
    inserted = st.one_of(
        st.binary(max_size=8),
        st.sampled_from([text.encode("utf-8", "surrogatepass") for text in (*ODD_TEXTS, *words)]),
    )
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            data[start:end] = draw(inserted)
        elif kind == 1:
            data[start:start] = draw(inserted)
        elif kind == 2:
            data[start:start] = data[start:end] * draw(st.sampled_from([1, 2, 50]))
        elif kind == 3:
            del data[start:]
        elif start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += _paths(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree[:4]):
            found += _paths(value, (*path, index))
    return found


@st.composite
def trees_like(draw: st.DrawFn, valid: Any) -> Any:
    """Return a tree of JSON values with a few nodes replaced, removed, renamed, wrapped or repeated."""
    root = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        paths = _paths(root[0])
        path = (0, *paths[draw(st.integers(0, len(paths) - 1))])
        parent: Any = root
        for key in path[:-1]:
            parent = parent[key]
        key, kind = path[-1], draw(st.integers(0, 5))
        if kind <= 1 or len(path) == 1:
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif kind == 2:
            del parent[key]
        elif kind == 3:
            wrap = draw(st.integers(0, 2))
            parent[key] = ([parent[key]], {"a": parent[key]}, [copy.deepcopy(parent[key]) for _ in range(3)])[wrap]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(ODD_TEXTS))] = parent.pop(key)
        else:
            parent.append(copy.deepcopy(draw(st.sampled_from(ODD_VALUES))))
    return root[0]


def json_bytes(valid: Any) -> st.SearchStrategy[bytes]:
    """Return JSON texts like that of a valid tree, damaged in structure or in bytes."""
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900])
    whole = trees_like(valid).map(encoded)
    return st.one_of(whole, whole, bytes_like(encoded(valid)), deep)


def encoded(tree: Any) -> bytes:
    """Return a tree as JSON; integers of any length, NaN and lone surrogates are written too."""
    return _text(tree).encode("utf-8", "surrogatepass")


def _text(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_text(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_text, tree)) + "]"
    return json.dumps(tree)
