"""Batches of a run, from its configuration and prepared data."""

from collections.abc import Mapping

from moe_dist.config import RunConfig
from moe_dist.config.sections.data import weight_changes
from moe_dist.data.blend import BlendPlan
from moe_dist.data.loader import EVERYTHING, SequenceLoader
from moe_dist.data.packing import PackedSequences
from moe_dist.data.prepare import PreparedData
from moe_dist.data.sequences import ConcatenatedSequences, Sequences
from moe_dist.data.token_file import TokenFile
from moe_dist.errors import DataError


def open_sequences(config: RunConfig, data: PreparedData, side: str) -> dict[str, Sequences]:
    """Open the sequences of each source's side, `train` or `validation`, packed as configured.

    Raises:
        DataError: a source is shorter than one sequence.
    """
    found = {}
    for name, source in data.sources.items():
        try:
            found[name] = _sequences(config, getattr(source, side))
        except DataError as error:
            raise DataError(f"corpus.sources.{name}: {error}" if name else str(error)) from error
    return found


def _sequences(config: RunConfig, tokens: TokenFile) -> Sequences:
    length = config.model.sequence_length
    return (PackedSequences if config.corpus.packing == "best_fit" else ConcatenatedSequences)(tokens, length)


def open_batches(config: RunConfig, data: PreparedData, rank: int = 0, ranks: int = 1) -> SequenceLoader:
    """Return the loader of a rank's part of the training batches.

    Raises:
        DataError: a source is shorter than one sequence, or all sources of the blend run out before the last step.
    """
    sources = open_sequences(config, data, "train")
    plan = blend_plan(config, {name: len(sequences) for name, sequences in sources.items()})
    return SequenceLoader(sources, config.train.global_batch_size, config.seed, rank, ranks, plan)


def blend_plan(config: RunConfig, counts: Mapping[str, int]) -> BlendPlan:
    """Return the order of the sources.

    Args:
        counts: sequences of each source.

    Raises:
        DataError: all sources run out before the last step.
    """
    if config.corpus.kind != "blend":
        return EVERYTHING
    batch, steps = config.train.global_batch_size, config.train.steps
    changes = [(step * batch, list(weights.values())) for step, weights in weight_changes(config.corpus)]
    plan = BlendPlan(changes, [_limit(config, name, count) for name, count in counts.items()])
    if plan.end is not None and plan.end < steps * batch:
        raise DataError(
            f"the sources of corpus.sources run out at step {plan.end // batch + 1} of train.steps={steps}: raise a "
            "max_tokens or max_epochs, or give a source without them a weight"
        )
    return plan


def _limit(config: RunConfig, name: str, count: int) -> int | None:
    """Return the sequences that a source of a blend may give; None: no limit."""
    source = config.corpus.sources[name]
    limits = [] if source.max_tokens is None else [source.max_tokens // config.model.sequence_length]
    if source.max_epochs is not None:
        limits.append(int(source.max_epochs * count))
    return min(limits, default=None)
