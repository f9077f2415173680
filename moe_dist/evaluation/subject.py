"""The trained model under evaluation: its weights over any number of ranks, and the tokenizer it was trained with."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_dist.checkpoint.load_model import load_model
from moe_dist.checkpoint.weights import TrainedWeights, find_weights
from moe_dist.config import RunConfig, WorldConfig, resolve_world
from moe_dist.data import Tokenizer, prepare_data
from moe_dist.data.prepare import TOKENIZER
from moe_dist.engine.startup import Process
from moe_dist.errors import DataError
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.stored_experts import StoredExperts
from moe_dist.topology.links import Links
from moe_dist.topology.mesh import Mesh

TRAINING_ONLY = ("recluster", "memory")
"""Sections that an evaluation leaves at their defaults."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated; the weights are read anew for each `model()`.

    Attributes:
        weights: with the configuration that the evaluation uses.
    """

    run: Path
    weights: TrainedWeights
    tokenizer: Tokenizer
    process: Process
    mesh: Mesh

    @property
    def config(self) -> RunConfig:
        """The configuration that the evaluation uses."""
        return self.weights.config

    def model(self, dtype: torch.dtype) -> LanguageModel:
        """The trained model on this rank; collective."""
        return load_model(self.weights, self.mesh, Links.discover(self.process.device), self.process.device, dtype)


def as_kept(model: LanguageModel) -> AbstractContextManager[None]:
    """While it holds the model computes with what is kept of its experts (`precision`), if that is not all of them."""
    if model.config.precision.residuals == "none" or is_packed(model):
        return nullcontext()
    return model.with_stored_experts()


def is_packed(model: LanguageModel) -> bool:
    """Whether its experts are in few bits already, and cannot be trained: it is from an export with --stored."""
    return any(isinstance(part, StoredExperts) for layer in model.clustered_layers() for part in layer.clusters)


def open_subject(run: Path, process: Process, world: WorldConfig, dtype: str) -> Subject:
    """Finds a run's weights and tokenizer; collective.

    Args:
        world: how this job's ranks are laid out; the run's own layout does not matter.
        dtype: what hidden vectors travel as between ranks.

    Raises:
        CheckpointError: there are no weights, or they are damaged.
        ConfigError: the experts cannot be laid out over these ranks.
        DataError: the run's tokenizer cannot be had.
    """
    weights = find_weights(run)
    config = evaluation_config(weights.config, world, dtype)
    mesh = Mesh.create(resolve_world(config, process.ranks), process.timeout)
    return Subject(run, replace(weights, config=config), _tokenizer(run, weights), process, mesh)


def evaluation_config(config: RunConfig, world: WorldConfig, dtype: str) -> RunConfig:
    """The run's configuration without what would make figures depend on how many ranks and sequences come together.

    No token is dropped for want of capacity, nothing is balanced, and nothing is regrouped.
    """
    moe = config.moe.model_copy(
        update={"capacity_factor": None, "wire_dtype": dtype, "balance": "none", "overlap_chunks": 1}
    )
    model = config.model.model_copy(update={"activation_checkpointing": False})
    fields = RunConfig.model_fields
    defaults = {name: fields[name].get_default() for name in TRAINING_ONLY if name in fields}
    return config.model_copy(update={**defaults, "moe": moe, "model": model, "world": world})


def _tokenizer(run: Path, weights: TrainedWeights) -> Tokenizer:
    """From the run's folder; where an earlier version has kept none there, from the cache or the corpus again."""
    folders = (run, *weights.path.parents[:2])  # RUN, RUN/final, RUN/checkpoints/step-...
    kept = next((folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_file()), None)
    tokenizer = Tokenizer(kept or _prepared_again(weights))
    expected = weights.manifest.data.vocab_size
    if tokenizer.vocab_size != expected:
        raise DataError(f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but the model was trained on {expected}")
    return tokenizer


def _prepared_again(weights: TrainedWeights) -> Path:
    data, expected = prepare_data(weights.config.corpus, weights.config.tokenizer), weights.manifest.data
    if data.train.checksum != expected.train_checksum:
        raise DataError(
            f"{weights.path} keeps no {TOKENIZER}, and corpus.* gives other tokens than the model was trained on: "
            f"put the tokenizer.model of that training into the run's folder"
        )
    return data.tokenizer_path
