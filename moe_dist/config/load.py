"""From YAML file and command line to a `RunConfig`: defaults < included files < file < `key.sub=value`."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from moe_dist.config.schema import RunConfig
from moe_dist.errors import ConfigError

INCLUDE = "include"


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key_node.value!r} comes twice, again on line {line}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads, merges and validates one configuration.

    Args:
        path: a YAML file; `include: [other.yaml]` in it (relative to it) is read first. None: the defaults.
        overrides: `key.sub=value` words, the value in YAML syntax; the last one wins.

    Raises:
        ConfigError: one line that names the file or key, the value, and what would be right.
    """
    tree = _read_with_includes(Path(path), ()) if path is not None else {}
    for word in overrides:
        tree = _merge(tree, _parse_override(word))
    _refuse_unknown_keys(tree)
    return _validate(tree)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal value.

    Without `summary_copy` and `checkpoint.resume`: to run the file again must neither overwrite what the first run
    handed over, nor go on from where it did.
    """
    left_out: Any = {"summary_copy": True, "checkpoint": {"resume"}}
    return yaml.safe_dump(config.model_dump(mode="json", exclude=left_out), sort_keys=False)


def _read_with_includes(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in parents:
        raise ConfigError(f"{path}: includes itself through {' -> '.join(p.name for p in parents)}")
    tree = _read_yaml(path)
    includes = tree.pop(INCLUDE, [])
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: `include` must be a list of file names, not {includes!r}")
    merged: dict[str, Any] = {}
    for name in includes:
        merged = _merge(merged, _read_with_includes(path.parent / name, (*parents, resolved)))
    return _merge(merged, tree)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {_one_line(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold `key: value` pairs, not a {type(tree).__name__}")
    return tree


def _parse_override(word: str) -> dict[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{word!r} is not an override: write key.sub=value, such as train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not a valid value: {_one_line(error)}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _valid_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _valid_keys(field.annotation, f"{prefix}{name}.")


def _given_keys(tree: Mapping[Any, Any], sections: set[str], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        yield key
        if isinstance(value, dict) and key in sections:
            yield from _given_keys(value, sections, f"{key}.")


def _refuse_unknown_keys(tree: Mapping[str, Any]) -> None:
    valid = list(_valid_keys(RunConfig))
    sections = {key.rpartition(".")[0] for key in valid}
    for key in _given_keys(tree, sections):
        if key not in valid:
            raise ConfigError(f"unknown key {key!r}: {_suggestion(key, valid)}")


def _suggestion(key: str, valid: Sequence[str]) -> str:
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in valid if name.rpartition(".")[2] == leaf]
    nearest = same_leaf or difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    return f"did you mean {nearest[0]!r}?"


def _validate(tree: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "configuration"
        given = first.get("input")
        shown = "" if isinstance(given, dict) else f"={given!r}"
        raise ConfigError(f"{key}{shown}: {_one_line(first['msg']).removeprefix('Value error, ')}") from error


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
