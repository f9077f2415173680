"""Model under evaluation: its weights over any number of ranks, and its tokenizer."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from moe_dist.checkpoint.load_model import load_model
from moe_dist.checkpoint.trained_weights import TrainedWeights, find_weights
from moe_dist.config import MemoryConfig, ReclusterConfig, RunConfig, WorldConfig, resolve_world
from moe_dist.config.consistency import check_slices
from moe_dist.data import Tokenizer, open_tokenizer, prepare_data, tokenizer_in
from moe_dist.distributed.collective_errors import raise_on_all_ranks
from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError, DataError
from moe_dist.memory.quantized_clusters import QuantizedClusterMemory
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.quantized_experts import QuantizedClusterExperts


@dataclass(frozen=True)
class EvaluatedModel:
    """Model to be evaluated; each `model()` reads the weights anew.

    Attributes:
        weights: weights, with the configuration of the evaluation.
        memory: storage of the quantized clusters of a loaded model (`memory.offload`).
    """

    run: Path
    weights: TrainedWeights
    tokenizer: Tokenizer
    process: RankInfo
    mesh: Mesh
    memory: QuantizedClusterMemory | None = None

    @property
    def config(self) -> RunConfig:
        """Configuration of the evaluation."""
        return self.weights.config

    def model(self, dtype: torch.dtype) -> LanguageModel:
        """Load the trained model on this rank; collective."""
        device = self.process.device
        model = load_model(self.weights, self.mesh, Links.discover(device), device, dtype, self.memory)
        model.end_of_document = self.tokenizer.end_of_document
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the memory tiers."""
        if self.memory is not None:
            self.memory.close()


def quantized_as_stored(model: LanguageModel) -> AbstractContextManager[None]:
    """Compute with experts quantized as `precision` configures, if it does, for the length of a `with`."""
    if model.config.precision.residuals == "none" or is_quantized(model):
        return nullcontext()
    return model.with_quantized_experts()


def is_quantized(model: LanguageModel) -> bool:
    """Return True if the experts are quantized already and cannot be trained: from an export with --stored."""
    return any(
        isinstance(part, QuantizedClusterExperts) for layer in model.clustered_layers() for part in layer.clusters
    )


def open_evaluated_model(
    run: Path, process: RankInfo, world: WorldConfig, dtype: str, memory: MemoryConfig | None = None
) -> EvaluatedModel:
    """Find a run's weights and tokenizer; collective.

    Args:
        world: layout of this job's ranks; that of the run does not matter.
        dtype: type of hidden vectors in all-to-alls.
        memory: tiers for the clusters of a `moe-dist export --stored` file; None, or no `offload`: on the device.

    Raises:
        CheckpointError: the weights are missing or damaged.
        ConfigError: the experts do not divide over these ranks, or cannot be offloaded.
        DataError: the run's tokenizer is missing.
        OffloadError: the offload directory cannot be used.
    """
    weights = find_weights(run)
    memory = memory or MemoryConfig()
    if memory.offload and not weights.stored:
        raise ConfigError(
            f"memory.offload=true evaluates a file of `moe-dist export --stored`, not {run}: export that, and evaluate "
            "the file"
        )
    config = evaluation_config(weights.config, world, dtype, memory)
    config.moe.layer_kind.check_layout(config.world, config.moe)
    check_slices(config.world, config.moe, config.precision, memory, config.recluster)
    shape = resolve_world(config, process.ranks)
    if weights.stored and shape.sliced:
        raise ConfigError(f"world.shard_mode=slice does not work with quantized experts ({run}): set it to replicate")
    mesh = Mesh.create(shape, process.timeout)
    tokenizer = tokenizer_of(run, weights)
    with raise_on_all_ranks():
        kept = _stored_memory(run, config, mesh, process) if memory.offload else None
    return EvaluatedModel(run, replace(weights, config=config), tokenizer, process, mesh, kept)


def _stored_memory(run: Path, config: RunConfig, mesh: Mesh, process: RankInfo) -> QuantizedClusterMemory:
    """Create the memory tiers, beside the exported file unless `memory.directory` is set."""
    beside = config.model_copy(update={"runs_dir": str(run.parent), "name": run.name})
    return QuantizedClusterMemory(beside, config.moe.clusters // mesh.shape.cluster, process.rank, process.device)


def evaluation_config(config: RunConfig, world: WorldConfig, dtype: str, memory: MemoryConfig) -> RunConfig:
    """Return the run's configuration, changed so that figures do not depend on ranks and batch size.

    Capacity, balancing and re-clustering are off.

    Raises:
        ConfigError: sequences or layers are to be divided over ranks.
    """
    if world.tensor * world.context * world.pipeline > 1:
        raise ConfigError(
            f"world.tensor={world.tensor} x world.context={world.context} x world.pipeline={world.pipeline}: an "
            "evaluation divides texts over ranks, not sequences or layers: leave all at 1"
        )
    moe = config.moe.model_copy(
        update={"capacity_factor": None, "wire_dtype": dtype, "balance": "none", "overlap_chunks": 1}
    )
    model = config.model.model_copy(update={"activation_checkpointing": False})
    job = {"recluster": ReclusterConfig(), "world": world, "memory": memory}
    return config.model_copy(update={**job, "moe": moe, "model": model})


def load_tokenizer(run: str | Path) -> Tokenizer:
    """Load the tokenizer that a run's model was trained with: `load_tokenizer("runs/demo")`.

    Raises:
        CheckpointError: the folder holds neither a tokenizer nor weights.
        DataError: its tokenizer is not that of the model, or cannot be read.
    """
    kept = tokenizer_in(Path(run))
    return open_tokenizer(kept) if kept else tokenizer_of(Path(run), find_weights(Path(run)))


def tokenizer_of(run: Path, weights: TrainedWeights) -> Tokenizer:
    """Load the tokenizer of the run's folder, or for earlier versions from the cache or the corpus."""
    folders = (run, *weights.path.parents[:2])  # RUN, RUN/final, RUN/checkpoints/step-...
    kept = next(filter(None, map(tokenizer_in, folders)), None)
    tokenizer = open_tokenizer(kept or _prepared_again(weights))
    expected = weights.manifest.data.vocab_size
    if weights.config.tokenizer.embedding_rows(tokenizer.vocab_size) != expected:
        raise DataError(f"{tokenizer.path} has {tokenizer.vocab_size} pieces, but the model was trained on {expected}")
    return tokenizer


def _prepared_again(weights: TrainedWeights) -> Path:
    data, expected = prepare_data(weights.config.corpus, weights.config.tokenizer), weights.manifest.data
    if data.checksum("train") != expected.train_checksum:
        raise DataError(
            f"{weights.path} has no tokenizer, and corpus.* gives other tokens than those of training: "
            f"put the tokenizer of that training into the run's folder"
        )
    return data.tokenizer_path
