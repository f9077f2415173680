"""Puts a language model together from its configuration, and counts its parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dist.compression import QuantizedCluster, StorageFormat
from moe_dist.config import RunConfig
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.errors import MoeDistError
from moe_dist.memory.block import Block
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.model.megatron_backbone import build_gpt, initialize_megatron
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.layer_kinds import LAYER_KINDS
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.parameter_class import REDUCED_OVER, ParameterClass, class_of
from moe_dist.moe.quantized_experts import QuantizedClusterExperts, storage_format
from moe_dist.moe.routing_statistics import RoutingStatistics


class LanguageModel(nn.Module):
    """A causal language model whose parts stand for this rank's share of the experts.

    Attributes:
        context: mesh, placements, balance state and traffic ledger that its layers share.
    """

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        mesh: Mesh,
        links: Links,
        micro_batches: int = 1,
        ledger: TrafficLedger | None = None,
        memory: ExpertMemory | None = None,
        *,
        quantized: bool = False,
    ) -> None:
        """
        Args:
            ledger: goes on with an account of traffic that exists; None: a new one.
            memory: keeps the experts from the moment they are made; None: they stay in memory.
            quantized: make no clusters; they are loaded in quantized form (`checkpoint/load_model.py`).
        """
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        moe = config.moe
        placements, statistics, layers = [], None, config.model.layers
        if moe.layer_kind.clustered:
            placements = [ExpertPlacement.contiguous(moe.experts, moe.clusters, mesh.shape)] * layers
        if config.recluster.period is not None:
            statistics = RoutingStatistics.create(layers, config.model.hidden_size, moe, config.recluster.decay)
        balance = BalanceState.create(layers, moe, torch.device("cpu"))
        fake_quantize_as = storage_format(config) if config.precision.residuals == "qat" else None
        ledger = ledger or TrafficLedger(links)
        self.context = LayerContext(
            mesh,
            placements,
            balance,
            ledger,
            config.seed,
            statistics,
            fake_quantize_as=fake_quantize_as,
            memory=memory,
            quantized=quantized,
        )
        if memory is not None:
            memory.describe = self.describe_block
        self._micro_batches = micro_batches
        initialize_megatron(config.world.timeout_seconds, mesh.shape.cluster * mesh.shape.shard)
        try:
            self.gpt = build_gpt(config.model, vocab_size, self._feed_forward, config.seed, self._recomputing)
        except MoeDistError as error:
            raise (memory and memory.refusal) or error from None

    def forward(self, sequence_BS: Tensor) -> Tensor:
        """Mean loss in nats a token over [B, S+1] token numbers: each predicts the next."""
        return self.token_losses(sequence_BS).mean()

    def token_losses(self, sequence_BS: Tensor) -> Tensor:
        """Loss of every predicted token, [B, S]."""
        tokens_BS, labels_BS = sequence_BS[:, :-1].contiguous(), sequence_BS[:, 1:].contiguous()
        position_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        losses: Tensor = self.gpt(tokens_BS, position_BS, None, labels=labels_BS)
        return losses

    def clustered_layers(self) -> list[ClusteredMoE]:
        """The layers of clustered experts, in order; none for other kinds."""
        return [module for module in self.modules() if isinstance(module, ClusteredMoE)]

    def _feed_forward(self, layer: int) -> nn.Module:
        make, config = LAYER_KINDS[self.config.moe.kind], self.config
        return make(layer, config.model, config.moe, self.context, 1 / self._micro_batches)

    def describe_block(self, block: Block) -> str:
        """Names the cluster that a block of this rank's is of."""
        clusters = self.context.placements[block.layer].clusters_of_block(self.context.mesh.at.cluster)
        return f"layer {block.layer}, cluster {clusters[block.local]}"

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """While a layer is recomputed in the backward pass, what it brings in stays for what follows."""
        memory = self.context.memory
        if memory is not None:
            memory.recomputing = True
        try:
            with self._uncounted():
                yield
        finally:
            if memory is not None:
                memory.recomputing = False

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """While a layer is recomputed its loads, already counted, are not counted again."""
        balance = self.context.balance
        before, balance.counting = balance.counting, False
        try:
            yield
        finally:
            balance.counting = before

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, and neither loads nor traffic enter the account of the training."""
        ledger = self.context.ledger
        before, ledger.recording = ledger.recording, False
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self._uncounted():
                yield
        finally:
            ledger.recording = before
            self.train(was_training)

    @contextmanager
    def with_quantized_experts(self) -> Iterator[None]:
        """Compute with the clusters as `precision` would store them; they cannot be trained meanwhile."""
        layers, form = self.clustered_layers(), storage_format(self.config)
        if self.context.memory is not None:
            with _fake_quantized(layers, form):
                yield
            return
        trained = [layer.clusters for layer in layers]
        for layer, parts in zip(layers, trained, strict=True):
            layer.clusters = nn.ModuleList(_quantized(part, form) for part in parts)
        try:
            yield
        finally:
            for layer, parts in zip(layers, trained, strict=True):
                layer.clusters = parts

    def to_device(self, device: torch.device) -> "LanguageModel":
        """Moves parameters and the balance state."""
        self.context.balance.to(device)
        if self.context.statistics is not None:
            self.context.statistics.to(device)
        return self.to(device)


@contextmanager
def _fake_quantized(layers: Iterable[ClusteredMoE], form: StorageFormat) -> Iterator[None]:
    """Round offloaded clusters whenever one is used: all of them in quantized form would not fit on the device."""
    parts = [part for layer in layers for part in layer.clusters if isinstance(part, ClusteredExperts)]
    before = [part.fake_quantize_as for part in parts]
    for part in parts:
        part.fake_quantize_as = form
    try:
        yield
    finally:
        for part, earlier in zip(parts, before, strict=True):
            part.fake_quantize_as = earlier


def _quantized(part: nn.Module, form: StorageFormat) -> QuantizedClusterExperts:
    assert isinstance(part, ClusteredExperts)
    weights = part.parameter_weights()
    return QuantizedClusterExperts(QuantizedCluster.of(weights, form), weights.base_in_DH.dtype, part.backend)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model, each once, however many ranks hold a copy."""

    total: int
    expert: int
    """Bases, residuals and vectors of all clusters, or all standard experts, without routers; 0 for dense."""
    expert_standard: int
    """What as many standard experts of the same width would have."""


def count_parameters(model: LanguageModel) -> ParameterCounts:
    """Counts from the tensors that this rank holds: every rank holds equally much of each class."""
    config, shape = model.config, model.context.mesh.shape
    held = dict.fromkeys(ParameterClass, 0)
    for parameter in model.parameters():
        held[class_of(parameter)] += parameter.numel()
    base = held[ParameterClass.BASE] * shape.cluster
    expert = held[ParameterClass.EXPERT] * shape.cluster * shape.shard
    moe = config.moe
    standard = config.model.layers * moe.layer_kind.standard_parameters(config.model.hidden_size, moe)
    return ParameterCounts(held[ParameterClass.DENSE] + base + expert, base + expert, standard)


def copies_of(parameter: nn.Parameter, mesh: Mesh) -> int:
    """How many ranks hold the same values of a parameter."""
    kind = REDUCED_OVER.get(class_of(parameter))
    return mesh.shape.ranks if kind is None else mesh.group(kind).size
