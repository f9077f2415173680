"""Layers of a pipeline stage: which they are, and the forward pass of a run of them (a chunk).

With C chunks a stage (`world.virtual_pipeline`), P stages hold the C * P runs of layers in turn, as in Megatron-core's
interleaved schedule.

Shapes: B sequences, S tokens of this rank, D model width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.distributed.mesh import Mesh
from moe_dist.model.flex_masks import FlexMasks


@dataclass(frozen=True)
class StageLayers:
    """Layers that one pipeline stage holds.

    Attributes:
        chunks: numbers of the layers of each chunk.
        stage: number of this stage.
        stages: number of all stages.
    """

    chunks: tuple[range, ...]
    stage: int
    stages: int

    @classmethod
    def of(cls, layers: int, mesh: Mesh) -> "StageLayers":
        """Return the layers of this rank's stage, of `layers` in all."""
        stages, chunks = mesh.shape.pipeline, mesh.shape.chunks
        size = layers // (stages * chunks)
        first = [(chunk * stages + mesh.stage) * size for chunk in range(chunks)]
        return cls(tuple(range(start, start + size) for start in first), mesh.stage, stages)

    @property
    def numbers(self) -> list[int]:
        """Numbers of all layers of this stage, in order."""
        return [number for chunk in self.chunks for number in chunk]

    @property
    def first(self) -> bool:
        """True if this stage holds the embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """True if this stage holds the output layer."""
        return self.stage == self.stages - 1

    def begins(self, chunk: int) -> bool:
        """Return True if a chunk is the first of the model."""
        return self.first and chunk == 0

    def ends(self, chunk: int) -> bool:
        """Return True if a chunk is the last of the model."""
        return self.last and chunk == len(self.chunks) - 1


def number_layers(gpt: nn.Module, layers: StageLayers) -> None:
    """Name the layers of a stage's model by their numbers in the whole model, for parameter names."""
    block: Any = gpt.decoder.layers  # type: ignore[union-attr]
    modules = dict(zip(map(str, layers.numbers), block, strict=True))
    block._modules.clear()
    block._modules.update(modules)


def positions(tokens_BS: Tensor) -> Tensor:
    """Return the index of each token in this rank's part of its sequence, [B, S]."""
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)


def rotary_positions(gpt: nn.Module, tokens: int) -> Tensor | None:
    """Return the angles of a part of a sequence; None where each layer has rotary positions of its own."""
    model: Any = gpt
    angles: Tensor | None = None if model.config.multi_latent_attention else model.rotary_pos_emb(tokens)
    return angles


def run_chunk(
    gpt: nn.Module,
    layers: StageLayers,
    chunk: int,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    mask: Tensor | FlexMasks | None,
    received_SBD: Tensor | None,
    output_weight: Tensor | None,
) -> Tensor:
    """Return the hidden states after a chunk [S, B, D], or the loss of every token [B, S] after the last one.

    Args:
        gpt: model of this stage (`build_gpt`).
        received_SBD: hidden states of the chunk before; None for the first one.
        output_weight: weight of the output layer, if it is that of another stage's embedding.
    """
    model: Any = gpt
    if layers.begins(chunk):
        hidden_SBD = model.embedding(input_ids=tokens_BS, position_ids=positions(tokens_BS))
    else:
        assert received_SBD is not None
        hidden_SBD = received_SBD
    rotary = rotary_positions(gpt, tokens_BS.shape[1])
    for number in layers.chunks[chunk]:
        layer = model.decoder.layers.get_submodule(str(number))
        hidden_SBD, _ = layer(hidden_SBD, attention_mask=mask, rotary_pos_emb=rotary)
    if not layers.ends(chunk):
        output_SBD: Tensor = hidden_SBD
        return output_SBD
    logits_SBV, _ = model.output_layer(model.decoder.final_layernorm(hidden_SBD), weight=output_weight)
    losses_BS: Tensor = model.compute_language_model_loss(labels_BS, logits_SBV)
    return losses_BS
