"""Language model built from a configuration."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.compression import StorageFormat
from moe_dist.config import RunConfig
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import GroupKind, Mesh
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.errors import MoeDistError
from moe_dist.memory.block import Block
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.model.document_mask import INSIDE, document_mask, document_numbers
from moe_dist.model.flex_masks import FlexMasks
from moe_dist.model.megatron_backbone import build_gpt, initialize_megatron
from moe_dist.model.pipeline_stage import StageLayers, positions, run_chunk
from moe_dist.model.stage_links import StageLinks, TiedEmbedding
from moe_dist.model.teacher_loss import TeacherTargets, kl_divergence
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.layer_context import LayerContext
from moe_dist.moe.layer_kinds import LAYER_KINDS
from moe_dist.moe.load_balancing import BalanceState
from moe_dist.moe.quantized_experts import QuantizedClusterExperts, storage_format
from moe_dist.moe.routing_statistics import RoutingStatistics


class LanguageModel(nn.Module):
    """Causal language model with this rank's share of the experts.

    Attributes:
        context: state shared by the layers: mesh, placements, balance state, traffic ledger.
        target_share: share of the targets among the training tokens; the training loss is a mean over targets.
        sequence_losses: sums of this rank's losses of each sequence, [B] a micro-batch, of the passes of a step so far.
        stage: layers of this rank's pipeline stage.
        tied: embedding that pipeline stages share; None: one stage, or embeddings are not tied.
        end_of_document: token that ends each document, for `corpus.document_mask`; set by those who have the tokenizer.
        teacher: a teacher's predictions for the sequences of the next forward pass; None: there is no teacher.
        taught_2: sums over micro-batches of the loss of the text and of the divergence from the teacher.
    """

    end_of_document: int | None = None
    target_share: float = 1.0
    teacher: TeacherTargets | None = None
    taught_2: Tensor | None = None

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
        """Build the model with this rank's share of the experts; collective.

        Args:
            micro_batches: number of micro-batches of a step, by which attached losses are divided.
            ledger: existing traffic ledger to continue; None: a new one.
            memory: memory that offloads experts as soon as they are created; None: experts stay on the device.
            quantized: create no clusters; they are loaded in quantized form (`checkpoint/load_model.py`).
        """
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.sequence_losses: list[Tensor] = []
        moe = config.moe
        placements, statistics, layers = [], None, config.moe_layers
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
        shape = mesh.shape
        self.stage = StageLayers.of(config.model.layers, mesh)
        initialize_megatron(config.world.timeout_seconds, shape.cluster * shape.shard, shape.tensor, shape.pipeline)
        try:
            self.gpt = build_gpt(config.model, vocab_size, self._feed_forward, config.seed, self._recomputing, mesh)
        except MoeDistError as error:
            raise (memory and memory.refusal) or error from None
        self._links = StageLinks(mesh) if shape.pipeline > 1 else None
        self.tied: TiedEmbedding | None = None
        if self._links is not None and config.model.tie_embeddings:
            weight = self.gpt.embedding.word_embeddings.weight if self.stage.first else None  # type: ignore[union-attr]
            self.tied = TiedEmbedding(self._links, cast(nn.Parameter | None, weight), self.stage.last)

    def forward(self, sequence_BS: Tensor) -> Tensor:
        """Return the mean next-token loss over [B, S+1] token ids, in nats per target.

        The number of targets is taken as its mean over all training tokens, so that each target has the same weight
        in any micro-batch of any rank. With a teacher, `distill.weight` of the loss is the divergence from it.
        """
        if self.teacher is None:
            return self.mean_of(self.token_losses(sequence_BS))
        logits_BSV, loss_BS = self.logits_and_losses(sequence_BS)
        self.sequence_losses.append(loss_BS.detach().double().sum(1))
        distill, target_BS = self.config.distill, self.targets_of(sequence_BS)
        divergence_BS = kl_divergence(logits_BSV, self.teacher, distill.temperature) * target_BS
        loss_2 = torch.stack([loss_BS.mean(), divergence_BS.mean()]) / self.target_share
        summed = loss_2.detach() / self._micro_batches
        self.taught_2 = summed if self.taught_2 is None else self.taught_2 + summed
        return (1 - distill.weight) * loss_2[0] + distill.weight * distill.temperature**2 * loss_2[1]

    def mean_of(self, losses_BS: Tensor) -> Tensor:
        """Return the mean of `token_losses` over targets, whose number is taken as its mean over the training data."""
        self.sequence_losses.append(losses_BS.detach().double().sum(1))
        return losses_BS.mean() / self.target_share

    def token_losses(self, sequence_BS: Tensor) -> Tensor:
        """Return the loss of every predicted token, [B, S], in nats; 0 for those that are no targets.

        With context parallelism, only those of this rank's part of each sequence. With pipeline parallelism (while
        `evaluating` only) the ranks of the last stage return them, the others zeros. Collective over the ranks of the
        sequences and over the stages.

        Args:
            sequence_BS: [B, S+1] token ids; the complement of an id (a negative number) is no target.
        """
        if self._links is not None:
            return self._losses_through_stages(sequence_BS, self._links)
        tokens_BS, labels_BS, target_BS, mask = self._divided(sequence_BS)
        losses: Tensor = self.gpt(tokens_BS, positions(tokens_BS), mask, labels=labels_BS)
        return losses * target_BS

    def logits_and_losses(self, sequence_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [B, S, V] and the result of `token_losses`; only where the vocabulary is not divided."""
        tokens_BS, labels_BS, target_BS, mask = self._divided(sequence_BS)
        logits_BSV: Tensor = self.gpt(tokens_BS, positions(tokens_BS), mask)
        loss_N = functional.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="none")
        return logits_BSV, loss_N.view_as(labels_BS) * target_BS

    def targets_of(self, sequence_BS: Tensor) -> Tensor:
        """Return which tokens of this rank's part of sequences [B, S + 1] are targets, bool [B, S]."""
        return self._part_of(sequence_BS[:, 1:] >= 0)

    def run_chunk(self, sequence_BS: Tensor, chunk: int, received_SBD: Tensor | None) -> Tensor:
        """Return the hidden states after a chunk of this pipeline stage, [S, B, D], or the losses after the last.

        Args:
            sequence_BS: as in `token_losses`.
            received_SBD: hidden states after the chunk before; None for the first.
        """
        tokens_BS, labels_BS, target_BS, mask = self._divided(sequence_BS)
        weight = None if self.tied is None else self.tied.copy
        output = run_chunk(self.gpt, self.stage, chunk, tokens_BS, labels_BS, mask, received_SBD, weight)
        return output * target_BS if self.stage.ends(chunk) else output

    def _losses_through_stages(self, sequence_BS: Tensor, links: StageLinks) -> Tensor:
        assert not torch.is_grad_enabled(), "the passes of training are those of `run_schedule`"
        sequences, length, shape = len(sequence_BS), sequence_BS.shape[1] - 1, self.context.mesh.shape
        like = self._empty(length // shape.sequence_parts, sequences, self.config.model.hidden_size)
        losses_BS = torch.zeros(sequences, length // shape.context, device=like.device)
        for chunk in range(len(self.stage.chunks)):
            received = None if self.stage.begins(chunk) else links.receive_from_before(like)
            output = self.run_chunk(sequence_BS, chunk, received)
            if self.stage.ends(chunk):
                losses_BS = output
            else:
                links.send_on(output)
        return losses_BS

    def fetch_embedding(self) -> None:
        """Copy a tied embedding to the last pipeline stage, if there are several; collective over them."""
        if self.tied is not None:
            rows = self.vocab_size // self.context.mesh.shape.tensor
            self.tied.fetch(self._empty(rows, self.config.model.hidden_size))

    def _empty(self, *sizes: int) -> Tensor:
        """Return an empty tensor of the type and on the device of the hidden states."""
        parameter = next(self.gpt.parameters())
        return torch.empty(sizes, dtype=parameter.dtype, device=parameter.device)

    def _divided(self, sequence_BS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | FlexMasks | None]:
        """Return this rank's tokens, labels, and which of them are targets, [B, S], and the mask of attention."""
        target_BS, code_BS = sequence_BS[:, 1:] >= 0, torch.maximum(sequence_BS, ~sequence_BS)
        mask, token_BS = self._document_mask(code_BS[:, :-1]), code_BS & (INSIDE - 1)
        tokens_BS, labels_BS = token_BS[:, :-1].contiguous(), token_BS[:, 1:].contiguous()
        return self._part_of(tokens_BS), self._part_of(labels_BS), self._part_of(target_BS), mask

    def _part_of(self, x_BS: Tensor) -> Tensor:
        """Return this rank's part of each sequence in attention."""
        mesh = self.context.mesh
        return x_BS.chunk(mesh.shape.context, dim=1)[mesh.in_attention.context]

    def _document_mask(self, tokens_BS: Tensor) -> Tensor | FlexMasks | None:
        """Return the mask of attention inside documents; None: each token attends to all earlier ones."""
        masked, flex = self.config.corpus.document_mask, self.config.model.attention == "flex"
        if not masked and not flex:
            return None
        if not masked:
            return FlexMasks(None, tokens_BS.shape[1], tokens_BS.device)
        assert self.end_of_document is not None, "the tokenizer's end-of-document token was not set"
        if flex:
            numbers_BS = document_numbers(tokens_BS, self.end_of_document)
            return FlexMasks(numbers_BS, tokens_BS.shape[1], tokens_BS.device)
        return document_mask(tokens_BS, self.end_of_document)

    def clustered_layers(self) -> list[ClusteredMoE]:
        """Return the layers of clustered experts, in order; none for other kinds of layers."""
        return [module for module in self.modules() if isinstance(module, ClusteredMoE)]

    def _feed_forward(self, layer: int) -> nn.Module:
        config, first = self.config, self.config.moe.dense_layers
        make = LAYER_KINDS[config.moe.kind if layer >= first else "dense"]
        number = layer - first if layer >= first else layer  # of the layers of experts, or of the dense ones
        return make(number, config.model, config.moe, self.context, 1 / self._micro_batches)

    def describe_block(self, block: Block) -> str:
        """Return a description of the cluster of a memory block, for messages."""
        mesh, placements = self.context.mesh, self.context.placements
        if placements:
            clusters = placements[block.layer].clusters_of_block(mesh.at.cluster)
            return f"layer {block.layer}, cluster {clusters[block.local]}"
        local = self.config.moe.experts // mesh.group(GroupKind.EXPERT_PARALLEL).size
        expert = mesh.index_in(GroupKind.EXPERT_PARALLEL) * local + block.local
        return f"layer {block.layer}, expert {expert}"

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Keep offloaded clusters on the device and skip counting during a recomputation in the backward pass."""
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
        """Disable the counting of loads, because they have been counted already or are not part of training."""
        balance = self.context.balance
        before, balance.counting = balance.counting, False
        try:
            yield
        finally:
            balance.counting = before

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Enter evaluation mode: no gradients, and loads and traffic are not counted."""
        ledger = self.context.ledger
        before, ledger.recording = ledger.recording, False
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self._uncounted():
                self.fetch_embedding()
                yield
            if self._links is not None:
                self._links.finish()
            if self.tied is not None:
                self.tied.drop()
        finally:
            ledger.recording = before
            self.train(was_training)

    @contextmanager
    def with_quantized_experts(self) -> Iterator[None]:
        """Compute with the clusters quantized as configured in `precision`; they cannot be trained meanwhile."""
        layers, quantization = self.clustered_layers(), storage_format(self.config)
        if self.context.memory is not None:
            with _fake_quantized(layers, quantization):
                yield
            return
        trained = [layer.clusters for layer in layers]
        for layer, parts in zip(layers, trained, strict=True):
            layer.clusters = nn.ModuleList(_quantized(part, quantization) for part in parts)
        try:
            yield
        finally:
            for layer, parts in zip(layers, trained, strict=True):
                layer.clusters = parts

    def to_device(self, device: torch.device) -> "LanguageModel":
        """Move parameters, balance state and routing statistics to a device."""
        self.context.balance.to(device)
        if self.context.statistics is not None:
            self.context.statistics.to(device)
        return self.to(device)


@contextmanager
def _fake_quantized(layers: Iterable[ClusteredMoE], quantization: StorageFormat) -> Iterator[None]:
    """Fake-quantize offloaded clusters at each use: all of them in quantized form may not fit on the device."""
    parts = [part for layer in layers for part in layer.clusters if isinstance(part, ClusteredExperts)]
    before = [part.fake_quantize_as for part in parts]
    for part in parts:
        part.fake_quantize_as = quantization
    try:
        yield
    finally:
        for part, earlier in zip(parts, before, strict=True):
            part.fake_quantize_as = earlier


def _quantized(part: nn.Module, quantization: StorageFormat) -> QuantizedClusterExperts:
    assert isinstance(part, ClusteredExperts)
    return QuantizedClusterExperts(part.quantized(quantization), next(part.parameters()).dtype, part.backend)
