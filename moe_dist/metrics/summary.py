"""Contract of `summary.json`: the keys of every run's summary (formulas: docs/metrics.md)."""

from collections.abc import Iterator, Mapping
from typing import Any

REQUIRED_KEYS = (
    "steps",
    "tokens",
    "validation.loss",
    "validation.perplexity",
    "validation.curve",
    "tokens_per_second",
    "parameters.total",
    "parameters.expert",
    "parameters.expert_standard",
    "all_to_all.bytes",
    "all_to_all.bytes_inter_node",
    "all_to_all.bytes_per_token_layer",
    "load.variance",
    "load.cv2",
    "recluster.rounds",
    "recluster.moved_experts",
    "recluster.bytes",
    "recluster.seconds",
    "memory.peak_rss_bytes",
    "memory.peak_rss_bytes_by_rank",
    "memory.peak_device_bytes",
    "world.data",
    "world.cluster",
    "world.shard",
    "seed",
    "versions",
)


def look_up(tree: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return the value under a dotted key, or `default` if a part of the key is missing."""
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


def missing_keys(summary: Mapping[str, Any]) -> list[str]:
    """Return the required keys that a summary lacks; a key with the value null is present."""
    absent = object()
    return [key for key in REQUIRED_KEYS if look_up(summary, key, absent) is absent]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return every leaf of a tree of mappings by its dotted key."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
