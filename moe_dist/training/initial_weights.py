"""Weights that a new run starts from (`checkpoint.init`), and the tokenizer that their embedding belongs to."""

from pathlib import Path

from moe_dist.checkpoint.trained_weights import TrainedWeights, find_weights
from moe_dist.data import PreparedData
from moe_dist.errors import CheckpointError
from moe_dist.evaluation.trained_model import tokenizer_of


def find_initial_weights(run: Path, data: PreparedData) -> TrainedWeights:
    """Find the weights of a run or a checkpoint, which read the same tokens as this run; collective.

    Raises:
        CheckpointError: there are none, they are an exported file, or their tokenizer is another one.
    """
    weights = find_weights(run)
    if weights.path.is_file():
        raise CheckpointError(f"checkpoint.init={run} is an exported file: give the folder of a run or a checkpoint")
    theirs = tokenizer_of(run, weights).path
    if theirs.read_bytes() != data.tokenizer_path.read_bytes():
        raise CheckpointError(
            f"checkpoint.init={run} was trained with another tokenizer ({theirs} is not {data.tokenizer_path}), so its "
            "embedding would not fit the tokens: remove the keys tokenizer.*, and that one is used"
        )
    return weights
