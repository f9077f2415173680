"""Links between our parameters and the tensors of a Hugging Face checkpoint, in both directions.

Shapes: D hidden, E experts, F hidden width of a feed-forward network, H = 2 F, V rows of the embedding, A width of all
query heads, C width of all key heads, Q query heads, K key heads, W width of a head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config import ModelConfig, RunConfig
from moe_dist.config.sections.model import LatentAttention
from moe_dist.integrations.huggingface.family import ExpertNames, Family

Shape = tuple[int, ...]
LAYERS = "gpt.decoder.layers"


@dataclass(frozen=True)
class TensorLink:
    """One of our parameters, and the tensors that hold the same values.

    Attributes:
        ours, shape: name and shape of our parameter.
        theirs: names and shapes of their tensors.
        join: returns our parameter of their tensors.
        split: returns their tensors of our parameter, the inverse of `join`.
    """

    ours: str
    shape: Shape
    theirs: Mapping[str, Shape]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


def links_of(config: RunConfig, vocab_size: int, family: Family | None) -> Iterator[TensorLink]:
    """Yield the links of all parameters of a model; without a family those outside the feed-forward layers only."""
    model = config.model
    embedding = (vocab_size, model.hidden_size)
    yield _same("gpt.embedding.word_embeddings.weight", "model.embed_tokens.weight", embedding)
    for layer in range(model.layers):
        yield from layer_links(config, family, layer)
    yield _same("gpt.decoder.final_layernorm.weight", "model.norm.weight", (model.hidden_size,))
    if not model.tie_embeddings:
        yield _same("gpt.output_layer.weight", "lm_head.weight", embedding)


def layer_links(config: RunConfig, family: Family | None, layer: int) -> Iterator[TensorLink]:
    """Yield the links of one layer; without a family those of its attention and norms only."""
    yield from _attention(config.model, f"{LAYERS}.{layer}.", f"model.layers.{layer}.")
    if family is not None:
        yield from feed_forward_links(config, family, layer)


def feed_forward_links(config: RunConfig, family: Family, layer: int) -> Iterator[TensorLink]:
    """Yield the links of one layer's dense network, or of its router, experts and shared expert."""
    d, moe = config.model.hidden_size, config.moe
    ours, theirs = f"{LAYERS}.{layer}.mlp.inner.", f"model.layers.{layer}."
    if family.experts is None or layer < moe.dense_layers:
        yield from _swiglu(ours, "w_in_DH", "w_out_FD", _dense_names(f"{theirs}mlp."), d, moe.dense_width)
        return
    block = f"{theirs}{family.experts.block}."
    yield _same(f"{ours}router.weight_ED", f"{block}gate.weight", (moe.experts, d))
    for expert in range(moe.experts):
        names = _expert_names(family.experts, f"{block}experts.{expert}.")
        yield from _swiglu(f"{ours}expert.{expert}.", "w_in", "w_out", names, d, moe.expert_hidden)
    if family.shared_expert is not None:
        names = _dense_names(f"{block}{family.shared_expert}.")
        yield from _swiglu(f"{ours}shared.", "w_in_DH", "w_out_FD", names, d, moe.shared_expert_hidden)
    if moe.shared_expert_gate:
        gate = {f"{block}shared_expert_gate.weight": (1, d)}
        yield TensorLink(f"{ours}shared.gate_D", (d,), gate, lambda t: t[0][0], lambda t: [t[None]])


def _attention(model: ModelConfig, ours: str, theirs: str) -> Iterator[TensorLink]:
    d, width = model.hidden_size, model.head_width
    queries, keys = model.heads * width, (model.kv_heads or model.heads) * width
    yield _same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (d,))
    yield _same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (d,))
    if model.latent is not None:
        yield from _latent(model, model.latent, f"{ours}self_attention.", f"{theirs}self_attn.")
        return
    yield _qkv(model, f"{ours}self_attention.linear_qkv", f"{theirs}self_attn", "weight", (d,))
    if model.qkv_bias:
        yield _qkv(model, f"{ours}self_attention.linear_qkv", f"{theirs}self_attn", "bias", ())
    yield _same(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (d, queries))
    if model.qk_norm != "none":
        sizes = (width, width) if model.qk_norm == "head" else (queries, keys)
        for letter, size in zip("qk", sizes, strict=True):
            own, other = f"{ours}self_attention.{letter}_layernorm.weight", f"{theirs}self_attn.{letter}_norm.weight"
            yield _same(own, other, (size,))


def _latent(model: ModelConfig, latent: LatentAttention, ours: str, theirs: str) -> Iterator[TensorLink]:
    """Yield the links of latent attention, whose projections have the same layout on both sides."""
    d, heads = model.hidden_size, model.heads
    queries = heads * (latent.plain_dim + latent.rotary_dim)
    if latent.query_rank is None:
        yield _same(f"{ours}linear_q_proj.weight", f"{theirs}q_proj.weight", (queries, d))
    else:
        yield _same(f"{ours}linear_q_down_proj.weight", f"{theirs}q_a_proj.weight", (latent.query_rank, d))
        yield _same(f"{ours}q_layernorm.weight", f"{theirs}q_a_layernorm.weight", (latent.query_rank,))
        yield _same(f"{ours}linear_q_up_proj.weight", f"{theirs}q_b_proj.weight", (queries, latent.query_rank))
    down, up = latent.kv_rank + latent.rotary_dim, heads * (latent.plain_dim + latent.value_dim)
    yield _same(f"{ours}linear_kv_down_proj.weight", f"{theirs}kv_a_proj_with_mqa.weight", (down, d))
    yield _same(f"{ours}kv_layernorm.weight", f"{theirs}kv_a_layernorm.weight", (latent.kv_rank,))
    yield _same(f"{ours}linear_kv_up_proj.weight", f"{theirs}kv_b_proj.weight", (up, latent.kv_rank))
    yield _same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (d, heads * latent.value_dim))


def _qkv(model: ModelConfig, ours: str, theirs: str, leaf: str, inputs: Shape) -> TensorLink:
    """Return the link of Megatron's one projection, whose rows are grouped by key head: its queries, key and value."""
    keys, width = model.kv_heads or model.heads, model.head_width
    queries = model.heads // keys
    rows = (model.heads * width, keys * width, keys * width)

    def join(parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.reshape(keys, -1, *inputs) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *inputs)

    def split(joined: Tensor) -> Sequence[Tensor]:
        grouped = joined.reshape(keys, (queries + 2) * width, *inputs).split([queries * width, width, width], dim=1)
        return [part.reshape(-1, *inputs) for part in grouped]

    names = {
        f"{theirs}.{letter}_proj.{leaf}": (size, *inputs) for letter, size in zip(("q", "k", "v"), rows, strict=True)
    }
    return TensorLink(f"{ours}.{leaf}", (sum(rows), *inputs), names, join, split)


def _swiglu(
    prefix: str, w_in: str, w_out: str, names: tuple[str, str, str], d: int, width: int
) -> Iterator[TensorLink]:
    """Yield the links of a SwiGLU network: ours multiply from the right, and gate and up are one matrix."""
    gate, up, down = names

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.T for part in parts], dim=1)

    def split(joined_DH: Tensor) -> Sequence[Tensor]:
        return [half_DF.T for half_DF in joined_DH.chunk(2, dim=1)]

    yield TensorLink(f"{prefix}{w_in}", (d, 2 * width), {gate: (width, d), up: (width, d)}, join, split)
    yield TensorLink(f"{prefix}{w_out}", (width, d), {down: (d, width)}, lambda t: t[0].T, lambda t: [t.T])


def _same(ours: str, theirs: str, shape: Shape) -> TensorLink:
    return TensorLink(ours, shape, {theirs: shape}, lambda t: t[0], lambda t: [t])


def _dense_names(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", f"{prefix}down_proj.weight"


def _expert_names(names: ExpertNames, prefix: str) -> tuple[str, str, str]:
    gate, up, down = (f"{prefix}{name}.weight" for name in names.projections)
    return gate, up, down
