"""Compression of a published mixture into clusters, layer by layer: no more than one layer is in memory at a time.

Several processes may share the layers: each runs the text through all of them, and compresses those that are free.

Calibration text passes through the original layers. Of each layer the tokens of every expert are caught, experts are
grouped by similarity, and bases and residuals are fitted to the tokens (`conversion/`).

Shapes: S tokens of a sequence, B sequences, D hidden, E experts.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist import __version__
from moe_dist.checkpoint.parameter_names import named_runs
from moe_dist.compression import ExpertMatrices
from moe_dist.config import CorpusConfig, RunConfig
from moe_dist.conversion.calibration_tokens import LayerTokens, captured_tokens, standard_layers
from moe_dist.conversion.compress import CompressedLayer
from moe_dist.conversion.expert_grouping import usage_of
from moe_dist.conversion.read_standard_experts import align_experts
from moe_dist.conversion.standard_to_clustered import cluster_layer
from moe_dist.data import Tokenizer
from moe_dist.data.corpora import open_corpus
from moe_dist.data.split import TRAIN
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.engine.optimizer_state import MASTER
from moe_dist.errors import ConfigError, DataError
from moe_dist.integrations.huggingface.imported_tensors import (
    ConvertedModel,
    ImportedModel,
    copied,
    read_link,
    selection_biases,
)
from moe_dist.integrations.huggingface.layer_store import LayerStore
from moe_dist.integrations.huggingface.source_folder import SourceFolder
from moe_dist.integrations.huggingface.tensor_links import LAYERS, layer_links, links_of
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.megatron_backbone import run_layer
from moe_dist.moe.standard_moe import StandardMoE

_ROWS = 8  # of a batch: any small number
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class CalibrationText:
    """Text that a compression is fitted to.

    Attributes:
        text: files, as `corpus.paths`; empty: the library source of Python.
        tokens: number of tokens; compression is fitted to one half and measured on the other.
    """

    text: Sequence[str]
    tokens: int

    @property
    def corpus(self) -> CorpusConfig:
        """Corpus of the text."""
        return CorpusConfig(kind="text", paths=list(self.text)) if self.text else CorpusConfig()


def layer_store(target: Path, config: RunConfig, source: SourceFolder, calibration: CalibrationText) -> LayerStore:
    """Return the store of the compressed layers of the run `target`."""
    files = sorted(source.folder.glob("*.safetensors"))
    parts = {
        "version": __version__,
        "config": config.model_dump(mode="json"),
        "text": [open_corpus(calibration.corpus).identity(), calibration.tokens],
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return LayerStore(target, identity, config.moe_layers)


def compress_layers(
    config: RunConfig,
    plain: ImportedModel,
    source: SourceFolder,
    tokenizer: Tokenizer,
    calibration: CalibrationText,
    store: LayerStore,
) -> None:
    """Compress the layers that are not stored and that no other process compresses.

    Args:
        config: configuration of the clustered model.

    Raises:
        ConfigError: the rank is larger than the experts.
        DataError: the text has fewer tokens.
    """  # fmt: skip
    _require_ranks(config)
    tokens = calibration.tokens
    length = min(config.model.sequence_length, max(2, tokens // 16))
    sequence_NS = _sequences(calibration.corpus, tokenizer, max(2, tokens // length), length)
    _walk(config, plain, source, sequence_NS, store)


def compressed(config: RunConfig, plain: ImportedModel, source: SourceFolder, store: LayerStore) -> ConvertedModel:
    """Return a mixture with its experts in clusters, from the stored layers."""
    kept = copied(links_of(plain.config, plain.vocab_size, plain.family), source)
    tensors = {name: tensor for name, tensor in kept.items() if ".expert." not in name}
    placements, errors = [], []
    first = ExpertPlacement.contiguous(config.moe.experts, config.moe.clusters, Mesh.alone().shape)
    for number in range(config.moe_layers):
        layer = store.read(number)
        assert layer is not None, "the caller has waited for it"
        tensors |= layer.tensors
        placements.append(replace(first.with_members(tuple(map(tuple, layer.members))), version=0))
        errors.append(layer.errors)
    return ConvertedModel(tensors, placements, errors, selection_biases(plain, source))


def _require_ranks(config: RunConfig) -> None:
    moe, largest = config.moe, min(config.model.hidden_size, config.moe.expert_hidden)
    for key, rank in {"rank": moe.rank, **({"base_rank": moe.base_rank} if moe.two_level_base else {})}.items():
        if rank > largest:
            raise ConfigError(f"moe.{key}={rank} is more than the width of the experts: must be <= {largest}")


def _sequences(corpus: CorpusConfig, tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    """Return calibration sequences [count, length] of the first documents."""
    ids: list[int] = []
    for document in tokenizer.encode_all(document.text for document in open_corpus(corpus).split.side(TRAIN)):
        ids += [*document, tokenizer.end_of_document]
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise DataError(f"the calibration text has {len(ids)} tokens, {count * length} are needed: give more, or --tokens")


@torch.no_grad()
def _walk(
    config: RunConfig, plain: ImportedModel, source: SourceFolder, sequence_NS: Tensor, store: LayerStore
) -> None:
    """Run the sequences through all layers, and compress those that are free."""
    process = init_distributed(config.world, alone=True)
    embedding_VD = source.tensor(EMBEDDING).float().to(process.device)
    hidden_SND = functional.embedding(sequence_NS.T.to(process.device), embedding_VD)
    halves = [list(half.split(_ROWS, dim=1)) for half in hidden_SND.tensor_split(2, dim=1)]
    first, biases = plain.config.moe.dense_layers, selection_biases(plain, source)
    for layer in range(first):
        model = _one_layer(plain, "dense").to_device(process.device)
        _fill(model, plain, source, layer)
        with model.evaluating():
            for batches in halves:
                batches[:] = [run_layer(model.gpt, 0, hidden_SBD) for hidden_SBD in batches]
    model = _one_layer(plain, "standard").to_device(process.device)
    (moe,) = standard_layers(model)
    with model.evaluating():
        for number in range(config.moe_layers):
            _fill(model, plain, source, first + number)
            for name, bias in biases.items():
                getattr(model.context.balance, name).copy_(bias[number : number + 1])
            with store.claim(number) as free:
                if free and store.finished:
                    return
                tokens = []
                for batches in halves:
                    with captured_tokens(moe) as caught:
                        batches[:] = [run_layer(model.gpt, 0, hidden_SBD) for hidden_SBD in batches]
                    tokens.append(caught)
                if free:
                    seeded = config.model_copy(update={"seed": config.seed + number})
                    made = _compressed_layer(moe, seeded, model.context.mesh, *tokens)
                    tensors = _tensors_of(f"{LAYERS}.{first + number}.mlp.inner.", made)
                    store.write(number, tensors, made.placement.members, made.figures[:, 0].tolist())


def _one_layer(plain: ImportedModel, kind: str) -> LanguageModel:
    """Return a model of one of the original layers, leading (dense) or following ones."""
    config = plain.config
    moe = config.moe.model_copy(update={"kind": kind, "dense_layers": 0})
    model = config.model.model_copy(update={"layers": 1})
    return LanguageModel(config.model_copy(update={"model": model, "moe": moe}), 1, Mesh.alone(), Links.alone())


def _fill(model: LanguageModel, plain: ImportedModel, source: SourceFolder, layer: int) -> None:
    """Read the weights of one layer into the only layer of `model`."""
    own, first = f"{LAYERS}.{layer}.", f"{LAYERS}.0."
    links = {link.ours.replace(own, first): link for link in layer_links(plain.config, plain.family, layer)}
    for parameter, runs in named_runs(model).items():
        for run in runs:
            if run.name in links:
                flat = parameter.detach().view(-1)
                size = torch.Size(run.shape).numel()
                flat[run.start : run.start + size].copy_(read_link(links[run.name], source).reshape(-1))


def _compressed_layer(
    moe: StandardMoE, config: RunConfig, mesh: Mesh, fit: LayerTokens, check: LayerTokens
) -> CompressedLayer:
    usage_E = usage_of(fit, check, config.moe.experts, moe.dispatcher.all_to_all.group)
    pairs = zip(moe.experts.w_in, moe.experts.w_out, strict=True)
    loads = [partial(ExpertMatrices, w_in.detach(), w_out.detach()) for w_in, w_out in pairs]
    held = align_experts(moe, loads, mesh, fit, check, usage_E)
    layer, _ = cluster_layer(held, moe, usage_E, config, mesh)
    return layer


def _tensors_of(prefix: str, layer: CompressedLayer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if layer.shared is not None:
        shared = vars(layer.shared)
        tensors |= {f"{prefix}shared_base.{name}": value for name, value in shared.items()}
    for cluster in layer.clusters:
        for name, states in cluster.base.items():
            tensors[f"{prefix}cluster.{cluster.number}.{name}"] = states[MASTER]
        for expert, residuals in cluster.residuals.items():
            named = {name: value for name, value in vars(residuals[MASTER]).items() if value is not None}
            tensors |= {f"{prefix}expert.{expert}.{name}": value for name, value in named.items()}
    return tensors
