"""Short words for the features at work, beside the figures of the progress display."""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_dist.metrics.summary import look_up
from moe_dist.metrics.summary_rows import byte_words


def words_at_work(line: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and words of each feature that a line of `metrics.jsonl` shows at work."""
    dropped, skipped = look_up(line, "load.dropped"), look_up(line, "train.skipped_steps")
    loaded, written = look_up(line, "offload.bytes_in"), look_up(line, "offload.bytes_out")
    if dropped:
        yield "dropped", f"{dropped:.1%}" if dropped >= 0.001 else "<0.1%"
    if skipped:
        yield "skipped", f"{skipped} steps"
    if loaded is not None and written is not None:
        yield "offload", f"{byte_words(loaded)} in, {byte_words(written)} out"
