"""Loading of a `RunConfig`; precedence: defaults < included files < file < `key.sub=value` overrides."""

import difflib
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from moe_dist.config.initial_run import with_initial_tokenizer
from moe_dist.config.schema import RunConfig
from moe_dist.config.shipped import or_shipped
from moe_dist.config.value_errors import first_error
from moe_dist.config.yaml_text import parse_yaml, shortened
from moe_dist.errors import ConfigError

INCLUDE = "include"
OTHER_NAMES = {
    "lr": "optimizer.learning_rate",
    "batch_size": "train.global_batch_size",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "num_layers": "model.layers",
    "n_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "seq_length": "model.sequence_length",
    "seq_len": "model.sequence_length",
    "num_experts": "moe.experts",
    "dtype": "train.precision",
    "grad_clip": "optimizer.clip_norm",
    "init_from": "checkpoint.init",
}
"""Names of other programs -> keys."""
_KEY = re.compile(r"\w+(\.\w+)*", re.ASCII)


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), below: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read, merge and validate a configuration.

    Args:
        path: a YAML file, the user's or a shipped one (`configs/...`); files in its `include: [other.yaml]` (relative
            to it) are read first. None: the defaults.
        overrides: `key.sub=value` words, the value in YAML syntax; the last one wins. Without one of the tokenizer, a
            run that starts from the weights of another has that one's tokenizer.
        below: settings over which all others win.

    Raises:
        ConfigError: one line that names the file or key, the value, and the remedy.
    """
    try:
        tree = _read_with_includes(or_shipped(Path(path)), ()) if path is not None else {}
        tree = _merge(below or {}, tree)
        for word in overrides:
            tree = _merge(tree, _parse_override(word))
        _reject_unknown_keys(tree)
        chosen = any(word.startswith("tokenizer") for word in overrides)
        return _validate(with_initial_tokenizer(tree, chosen))
    except RecursionError as error:  # an anchor within its own value
        raise ConfigError("the configuration contains itself, or is nested too deeply") from error


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal value.

    `summary_copy` and `checkpoint.resume` are left out: a second run of the file must not overwrite the first one's
    summary, nor resume from its checkpoint.
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
        raise ConfigError(f"{path}: `include` must be a list of file names, not {reprlib.repr(includes)}")
    merged: dict[str, Any] = {}
    for name in includes:
        merged = _merge(merged, _read_with_includes(_included(path, name), (*parents, resolved)))
    return _merge(merged, tree)


def _included(path: Path, name: str) -> Path:
    """Return the file that an `include` names: relative to the file with the include, or a shipped one.

    Raises:
        ConfigError: there is neither.
    """
    target = path.parent / os.path.expanduser(name)
    found = target if target.exists() else or_shipped(Path(name))
    if not found.exists():
        raise ConfigError(f"{path}: include: {name!r} is neither relative to this file nor a shipped configuration")
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{str(path)!r}: cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold `key: value` pairs, not a {type(tree).__name__}")
    return tree


def _parse_override(word: str) -> dict[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"{shortened(word)!r} is not an override: write key.sub=value, such as train.steps=100")
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{key}: {shortened(text)!r} is not a valid value: {error}") from error
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


def _reject_unknown_keys(tree: Mapping[str, Any]) -> None:
    valid = list(_valid_keys(RunConfig))
    sections = {key.rpartition(".")[0] for key in valid}
    for key in _given_keys(tree, sections):
        if key not in valid:
            raise ConfigError(f"unknown key {key!r}: {_suggestion(key, valid)}")


def _suggestion(key: str, valid: Sequence[str]) -> str:
    leaf = key.rpartition(".")[2]
    if leaf in OTHER_NAMES:
        return f"did you mean {OTHER_NAMES[leaf]!r}?"
    same_leaf = [name for name in valid if name.rpartition(".")[2] == leaf]
    nearest = same_leaf or difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    return f"did you mean {nearest[0]!r}?"


def _validate(tree: Mapping[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(first_error(error)) from error
