"""Strict YAML parser: every text gives a value or an error of one line."""

from typing import Any

import yaml

from moe_dist.errors import ConfigError


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values, lists and mappings.

    Raises:
        ConfigError: one line without the text's origin, which the caller adds.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ConfigError(f"{line}{error.problem or error.context}: check indentation, colons and quotes") from error
    except yaml.YAMLError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ConfigError("it is nested too deeply") from error


class _StrictLoader(yaml.SafeLoader):
    """Loader that rejects duplicate and complex keys, and converts all failures to `YAMLError`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"the key on line {line} is a list or a mapping; a key must be a word")
            if key_node.value in seen:
                raise yaml.YAMLError(f"the key {key_node.value!r} comes twice, again on line {line}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            # YAML's constructors of dates and numbers: impossible dates, digits of another base, unhashable keys
            if not isinstance(node, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {node.start_mark.line + 1} cannot be read: {error}") from error
            kind = node.tag.rpartition(":")[2]
            raise yaml.YAMLError(
                f"{shortened(node.value)!r} on line {node.start_mark.line + 1} looks like a value of type {kind} but "
                "is none: quote it if it is text"
            ) from error


def shortened(text: str, longest: int = 60) -> str:
    """Return the text, cut to `longest` characters."""
    return text if len(text) <= longest else f"{text[:longest]}..."
