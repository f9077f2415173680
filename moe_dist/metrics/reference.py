"""Reference of all figures: the tables of docs/metrics.md, generated from their definitions; `make docs` writes them.

A key's cell lists keys; `.name` continues the key before, NAME and * stand for any names.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_dist.metrics.step_definitions import LOADS, STEPS
from moe_dist.metrics.summary import flatten
from moe_dist.metrics.summary_definitions import SUMMARY

TABLES = {"summary.json": SUMMARY, "metrics.jsonl": STEPS, "load.jsonl": LOADS}
ALWAYS = ("step", "time")
"""Keys of every line, which the text above the tables explains."""


def filled(text: str) -> str:
    """Return the text of docs/metrics.md with its tables written again."""
    for name, definitions in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        rows = "".join(f"| {key} | {definition} |\n" for key, definition in definitions.items())
        pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
        table = f"{start}| key | definition |\n| --- | --- |\n{rows}{end}"
        text = pattern.sub(table.replace("\\", r"\\"), text)
    return text


def undefined(table: str, record: Mapping[str, Any]) -> list[str]:
    """Return the keys of a record that its table does not define; a key also defines what is below it."""
    keys = [key for cell in TABLES[table] for key in keys_of(cell)]
    patterns, found = [_pattern(key) for key in keys], []
    for name, value in flatten(record):
        of_unused = value is None and any(key.startswith(f"{name}.") for key in keys)  # a feature that is off is null
        if name not in ALWAYS and not of_unused and not any(pattern.match(name) for pattern in patterns):
            found.append(name)
    return found


def keys_of(cell: str) -> Iterator[str]:
    """Yield the full keys that a cell lists."""
    before = ""
    for key in re.findall(r"`(.+?)`", cell):
        before = before.rpartition(".")[0] + key if key.startswith(".") else key
        yield before


def _pattern(key: str) -> re.Pattern[str]:
    names = [
        r"[^.]+" if name == "NAME" or name.startswith("<") else r".+" if name == "*" else re.escape(name)
        for name in key.split(".")
    ]
    return re.compile(r"\.".join(names) + r"(\.|$)")


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
