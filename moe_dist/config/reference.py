"""Reference of all configuration keys as Markdown, generated from the sections; `make docs` writes docs/keys.md."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moe_dist.config.schema import RunConfig
from moe_dist.config.sections.base import LARGEST_BYTES, LARGEST_INTEGER

HEAD = """# Configuration keys

Generated from the code by `make docs`. A configuration is YAML; `key=value` words of a command win over it, and it wins
over the files that it `include`s. `moe-dist config CONFIG` shows the resolved values.
"""
UNLIMITED = {LARGEST_INTEGER, LARGEST_BYTES}
Schema = Mapping[str, Any]


def keys_reference() -> str:
    """Return a table of keys for the top level and for each section: values, default, meaning."""
    schema = RunConfig.model_json_schema()
    own = [(key, field) for key, field in schema["properties"].items() if _section(field, schema) is None]
    sections = [(key, found) for key, field in schema["properties"].items() if (found := _section(field, schema))]
    parts = [HEAD, _table("", own, schema)]
    for name, section in sections:
        parts += [f"## {name}\n", f"{section.get('description', '').splitlines()[0]}\n"]
        parts.append(_table(f"{name}.", _with_entries(section["properties"], schema), schema))
    return "\n".join(parts)


def _section(field: Schema, schema: Schema) -> Schema | None:
    """Return the definition that a key's value must have; None: it is no section."""
    reference = field.get("$ref")
    return None if reference is None else schema["$defs"][reference.rpartition("/")[2]]


def _with_entries(fields: Schema, schema: Schema) -> list[tuple[str, Schema]]:
    """Return keys with those of a mapping's entries that the section itself has not, such as `sources.NAME.weight`."""
    found = []
    for name, field in fields.items():
        found.append((name, field))
        entry = _entry(field, schema)
        inner = {} if entry is None else entry["properties"]
        found += [(f"{name}.NAME.{key}", own) for key, own in inner.items() if key not in fields]
    return found


def _entry(field: Schema, schema: Schema) -> Schema | None:
    """Return the definition of the entries of a mapping of names to sections; None: it is none."""
    return next((_section(entry, schema) for entry in field.get("patternProperties", {}).values()), None)


def _table(prefix: str, fields: list[tuple[str, Schema]], schema: Schema) -> str:
    lines = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields:
        values = " or ".join(dict.fromkeys(_values(field, schema)))
        cells = [f"`{prefix}{name}`", values, _default(field), field.get("description", "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: Schema) -> str:
    return f"`{json.dumps(field['default'])}`" if "default" in field else ""


def _values(field: Schema, schema: Schema) -> Iterator[str]:
    """Yield the kinds of values that a key takes."""
    for option in field.get("anyOf", [field]):
        if "$ref" in option:
            inner = _section(option, schema)
            assert inner is not None
            yield "a section of " + ", ".join(f"`{key}`" for key in inner.get("properties", {}))
        elif "enum" in option or "const" in option:
            yield ", ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
        elif _entry(option, schema) is not None:
            yield "sections by name"
        elif option.get("type") == "array":
            yield "list of " + " or ".join(_values(option.get("items", {}), schema))
        else:
            yield option.get("type", "any") + _limits(option)


def _limits(option: Schema) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    found = [(word, option[key]) for key, word in words.items() if option.get(key, LARGEST_BYTES) not in UNLIMITED]
    said = [f"{word} {int(limit) if limit == int(limit) else limit}" for word, limit in found]
    return f" ({', '.join(said)})" if said else ""


if __name__ == "__main__":
    print(keys_reference(), end="")
