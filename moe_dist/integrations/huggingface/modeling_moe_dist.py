"""Language model of a moe-dist run for transformers: Llama's attention, and its own feed-forward layers.

This file is copied beside exported weights, so it imports torch and transformers only. Router arithmetic is in float32;
experts are computed one after another, and quantized factors are unpacked where they are used.

Shapes: T tokens, R tokens of a cluster or an expert, D hidden, F expert hidden, H = 2 F (gate | up), E experts,
G clusters, N experts of a cluster, M clusters and K experts of a token.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MistralModel

FACTORS = {"in_u_DR": -2, "in_v_RH": -1, "out_u_FR": -2, "out_v_RD": -1}
"""Low-rank factors of an expert, and their long axis, along which groups of quantized numbers run."""


class MoeDistConfig(LlamaConfig):  # type: ignore[misc]
    """Keys of Llama, and in `moe_dist` the sections `model`, `moe` and `precision` of the run.

    Attributes:
        moe_dist: the sections, and `quantized`: whether factors are stored in few bits.
    """

    model_type = "moe_dist"
    moe_dist: dict[str, Any] | None = None

    def validate_architecture(self) -> None:
        """Accept any width of a head."""

    def section(self, name: str) -> Any:
        """Return one of the entries of `moe_dist`."""
        return cast(dict[str, Any], self.moe_dist)[name]


class MoeDistForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Causal language model with the feed-forward layers of a run."""

    config_class = MoeDistConfig
    _keep_in_fp32_modules_strict = ["expert_bias_E", "cluster_bias_G"]  # noqa: RUF012 (as transformers declares it)
    _can_compile_fullgraph = False

    def __init__(self, config: MoeDistConfig) -> None:
        super().__init__(config)
        if config.section("model").get("window") is not None:
            self.model = MistralModel(config)  # Llama's with a sliding window
        for number, layer in enumerate(self.model.layers):
            layer.mlp = _feed_forward(config, number)
            if config.section("model").get("latent") is None:
                _extend_attention(layer.self_attn, config)
            else:
                layer.self_attn = _latent_attention(config, number)
        self.post_init()


class NormedLinear(nn.Linear):
    """Projection of queries or keys, whose heads are normalized separately or together."""

    def __init__(self, inputs: int, outputs: int, bias: bool, norm: nn.RMSNorm) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self._norm = (norm,)  # in a tuple, so that it is no module of this one

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized projection."""
        (norm,) = self._norm
        y = super().forward(x)
        normed: Tensor = norm(y.unflatten(-1, (-1, norm.weight.shape[0])))
        return normed.flatten(-2)


class PackedFactor(nn.Module):
    """Factor in few bits: value = scale * (code - zero) for groups of neighbors along the long axis, stored last."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, shape: tuple[int, ...], axis: int, precision: dict[str, Any]) -> None:
        super().__init__()
        self.axis, self.length, self.bits = axis, shape[axis], precision["bits"]
        self.group = precision["group_size"]
        others = [size for at, size in enumerate(shape) if at != len(shape) + axis]
        groups = -(-self.length // self.group)
        self.register_buffer("codes", torch.zeros(*others, -(-self.length * self.bits // 8), dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(*others, groups, dtype=getattr(torch, precision["scale_dtype"])))
        zeros = None if precision["symmetric"] else torch.zeros(*others, -(-groups * self.bits // 8), dtype=torch.uint8)
        self.register_buffer("zeros", zeros)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the values, rounded once to `dtype`."""
        codes = _unpack(self.codes, self.bits)[..., : self.length].float()
        groups = self.scales.shape[-1]
        zeros = torch.full_like(self.scales, 1 << (self.bits - 1), dtype=torch.float32)
        if self.zeros is not None:
            zeros = _unpack(self.zeros, self.bits)[..., :groups].float()
        spread = [
            part.repeat_interleave(self.group, dim=-1)[..., : self.length] for part in (zeros, self.scales.float())
        ]
        value: Tensor = ((codes - spread[0]) * spread[1]).movedim(-1, self.axis).to(dtype)
        return value


class DenseNetwork(nn.Module):
    """Dense network, (silu(x W_gate) * (x W_up)) W_out; of a shared expert with a sigmoid gate."""

    def __init__(self, hidden: int, width: int, gated: bool = False) -> None:
        super().__init__()
        self.w_in_DH = nn.Parameter(torch.empty(hidden, 2 * width))
        self.w_out_FD = nn.Parameter(torch.empty(width, hidden))
        self.gate_D = nn.Parameter(torch.empty(hidden)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """Return y of `x` [..., D], in its shape."""
        y: Tensor = _swiglu(x @ self.w_in_DH) @ self.w_out_FD
        return y if self.gate_D is None else torch.sigmoid(x @ self.gate_D).unsqueeze(-1) * y


class RouterWeights(nn.Module):
    """Embeddings of the experts."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(torch.empty(experts, hidden))


class MixtureLayer(nn.Module):
    """Router and shared expert of a layer, and the selection biases of its experts; the base of both mixtures."""

    expert_bias_E: Tensor

    def __init__(self, config: MoeDistConfig) -> None:
        super().__init__()
        self.moe, hidden = config.section("moe"), config.hidden_size
        self.router = RouterWeights(self.moe["experts"], hidden)
        self.register_buffer("expert_bias_E", torch.zeros(self.moe["experts"]))
        width = self.moe["shared_expert_hidden"]
        self.shared = DenseNetwork(hidden, width, self.moe["shared_expert_gate"]) if width else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's addition to the residual stream."""
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        y_TD: Tensor = self.experts(x_TD) * self.moe["gate_scale"]
        if self.shared is not None:
            y_TD = y_TD + cast(Tensor, self.shared(x_TD))
        return y_TD.view_as(hidden)

    @property
    def sigmoid(self) -> bool:
        """True if scores are sigmoids of logits; False: the logits."""
        return bool(self.moe.get("score") == "sigmoid")

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores by which experts are chosen."""
        return logits.sigmoid() if self.sigmoid else logits

    def log_gates(self, logits: Tensor) -> Tensor:
        """Return the logarithms that gates are a softmax of."""
        return functional.logsigmoid(logits) if self.sigmoid else logits

    def experts(self, x_TD: Tensor) -> Tensor:
        """Return the gated sum of each token's experts."""
        raise NotImplementedError


class StandardMixture(MixtureLayer):
    """Full experts, of which each token takes k among all."""

    def __init__(self, config: MoeDistConfig) -> None:
        super().__init__(config)
        d, f = config.hidden_size, self.moe["expert_hidden"]
        shapes = {"w_in": (d, 2 * f), "w_out": (f, d)}
        self.expert = nn.ModuleDict({str(e): _Weights(shapes) for e in range(self.moe["experts"])})

    def experts(self, x_TD: Tensor) -> Tensor:
        """Return the gated sum of each token's experts."""
        logits_TE = functional.linear(x_TD.float(), self.router.weight_ED.float())
        score_TE = self._in_best_groups(self.scores(logits_TE) + self.expert_bias_E)
        expert_TK = score_TE.topk(self.moe["top_k"], dim=-1).indices
        gate_TK = self.log_gates(logits_TE).gather(-1, expert_TK).softmax(-1)
        if not self.moe["normalize_gates"] or self.moe["top_k"] == 1:
            all_TE = logits_TE.sigmoid() if self.sigmoid else logits_TE.softmax(-1)
            gate_TK = all_TE.gather(-1, expert_TK)
        y_TD = torch.zeros_like(x_TD)
        for e, weights in self.expert.items():
            token_R, k_R = torch.nonzero(expert_TK == int(e), as_tuple=True)
            if len(token_R):
                y_RD = _swiglu(x_TD[token_R] @ cast(Tensor, weights.w_in)) @ cast(Tensor, weights.w_out)
                y_TD.index_add_(0, token_R, y_RD * gate_TK[token_R, k_R, None].to(y_RD.dtype))
        return y_TD

    def _in_best_groups(self, score_TE: Tensor) -> Tensor:
        """Return the scores with those outside of a token's best groups of experts at minus infinity."""
        groups = self.moe.get("groups", 1)
        if groups == 1:
            return score_TE
        score_TGN = score_TE.unflatten(-1, (groups, -1))
        score_TG = score_TGN.topk(2 if self.sigmoid else 1, dim=-1).values.sum(-1)
        chosen_TG = score_TG.topk(self.moe["top_groups"], dim=-1).indices
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(-1, chosen_TG, True)
        within: Tensor = score_TGN.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(-2)
        return within


class ClusteredMixture(MixtureLayer):
    """Clusters of experts W = B + U V that share a base; a token takes m clusters, then k experts in each of them."""

    cluster_bias_G: Tensor
    member_GN: Tensor

    def __init__(self, config: MoeDistConfig) -> None:
        super().__init__(config)
        moe, d, f = self.moe, config.hidden_size, self.moe["expert_hidden"]
        base: dict[str, tuple[int, ...]] = {"w_in_DH": (d, 2 * f), "w_out_FD": (f, d)}
        r = moe["rank"]
        residual: dict[str, tuple[int, ...]] = {
            "in_u_DR": (d, 2 * r),
            "in_v_RH": (2, r, f),
            "out_u_FR": (f, r),
            "out_v_RD": (r, d),
        }
        if moe["expert_vectors"]:
            residual |= {"hidden_gate_F": (f,), "hidden_bias_H": (2 * f,), "output_bias_D": (d,)}
        packed = config.section("precision") if config.section("quantized") else None
        self.shared_base = None
        if moe["base"] == "shared+cluster":
            self.shared_base, rank = _Weights(base), moe["base_rank"]
            base = {"in_p_DR": (d, rank), "in_q_RH": (rank, 2 * f), "out_p_FR": (f, rank), "out_q_RD": (rank, d)}
        self.cluster = nn.ModuleDict({str(c): _Weights(base) for c in range(moe["clusters"])})
        self.expert = nn.ModuleDict({str(e): _Weights(residual, packed) for e in range(moe["experts"])})
        self.register_buffer("cluster_bias_G", torch.zeros(moe["clusters"]))
        self.register_buffer("member_GN", torch.arange(moe["experts"]).view(moe["clusters"], -1))

    def experts(self, x_TD: Tensor) -> Tensor:
        """Return the sum over each token's clusters, weighted by a softmax over the logits of clusters and experts."""
        weight_ED, moe = self.router.weight_ED.float(), self.moe
        prototype_GD = weight_ED[self.member_GN].sum(1) / math.sqrt(self.member_GN.shape[1])
        logits_TG = functional.linear(x_TD.float(), prototype_GD)
        cluster_TM = (logits_TG + self.cluster_bias_G).topk(moe["top_clusters"], dim=-1).indices
        mass_TM = logits_TG.gather(-1, cluster_TM)
        y_TMD = x_TD.new_zeros(*cluster_TM.shape, x_TD.shape[1])
        for c in range(moe["clusters"]):
            token_R, m_R = torch.nonzero(cluster_TM == c, as_tuple=True)
            if len(token_R):
                y_TMD[token_R, m_R], log_mass_R = self._cluster(c, x_TD[token_R])
                mass_TM[token_R, m_R] += log_mass_R
        return (mass_TM.softmax(-1).to(x_TD.dtype).unsqueeze(-1) * y_TMD).sum(1)

    def _cluster(self, c: int, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of one cluster [R, D], and the logsumexp of the logits that its gates come from [R]."""
        member_N = self.member_GN[c]
        logits_RN = functional.linear(x_RD.float(), self.router.weight_ED[member_N].float())
        slot_RK = (self.scores(logits_RN) + self.expert_bias_E[member_N]).topk(self.moe["top_k"], dim=-1).indices
        logits_RN = self.log_gates(logits_RN)
        considered = logits_RN.gather(-1, slot_RK) if self.moe["normalize_gates"] else logits_RN
        gate_RK = considered.softmax(-1)
        if not self.moe["normalize_gates"]:
            gate_RK = gate_RK.gather(-1, slot_RK)
        base = self._base_products(c)
        pre_RH = base[0](x_RD)
        h_RF, y_RD = x_RD.new_zeros(len(x_RD), pre_RH.shape[1] // 2), torch.zeros_like(x_RD)
        for slot, e in enumerate(member_N.tolist()):
            row_L, k_L = torch.nonzero(slot_RK == slot, as_tuple=True)
            if len(row_L):
                gate_L1 = gate_RK[row_L, k_L, None].to(x_RD.dtype)
                h_LF, y_LD = _residual(cast(_Weights, self.expert[str(e)]), x_RD[row_L], pre_RH[row_L])
                h_RF.index_add_(0, row_L, h_LF * gate_L1)
                y_RD.index_add_(0, row_L, y_LD * gate_L1)
        return y_RD + base[1](h_RF), considered.logsumexp(-1)

    def _base_products(self, c: int) -> tuple[Any, Any]:
        """Return the products with a cluster's base: its own weights, or shared ones plus low-rank factors."""
        own: Any = self.cluster[str(c)]
        shared: Any = self.shared_base
        if shared is None:
            return (lambda x: x @ own.w_in_DH), (lambda h: h @ own.w_out_FD)
        return (
            lambda x: x @ shared.w_in_DH + (x @ own.in_p_DR) @ own.in_q_RH,
            lambda h: h @ shared.w_out_FD + (h @ own.out_p_FR) @ own.out_q_RD,
        )


class _Weights(nn.Module):
    """Named parameters; low-rank factors may be packed."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], packed: dict[str, Any] | None = None) -> None:
        super().__init__()
        for name, shape in shapes.items():
            if packed is not None and name in FACTORS:
                self.add_module(name, PackedFactor(shape, FACTORS[name], packed))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def value(self, name: str, dtype: torch.dtype) -> Any:
        """Return a tensor in a type, None if there is none."""
        found = getattr(self, name, None)
        return found.unpacked(dtype) if isinstance(found, PackedFactor) else found


def _residual(expert: _Weights, x_LD: Tensor, pre_LH: Tensor) -> tuple[Tensor, Tensor]:
    """Return an expert's hidden units, and its output without the base's product."""
    names = (*FACTORS, "hidden_gate_F", "hidden_bias_H", "output_bias_D")
    in_u, in_v, out_u, out_v, gate_F, bias_H, bias_D = (expert.value(name, x_LD.dtype) for name in names)
    u_gate, u_up = (x_LD @ in_u).chunk(2, dim=1)
    pre_LH = pre_LH + torch.cat([u_gate @ in_v[0], u_up @ in_v[1]], dim=1)
    h_LF = _swiglu(pre_LH if bias_H is None else pre_LH + bias_H)
    if gate_F is not None:
        h_LF = h_LF * (1 + torch.tanh(gate_F))
    y_LD = (h_LF @ out_u) @ out_v
    return h_LF, y_LD if bias_D is None else y_LD + bias_D


def _latent_attention(config: MoeDistConfig, number: int) -> nn.Module:
    """Return DeepSeek's attention; its sizes are keys of the configuration."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    attention: nn.Module = DeepseekV3Attention(config, number)
    return attention


def _feed_forward(config: MoeDistConfig, number: int) -> nn.Module:
    moe = config.section("moe")
    if moe["kind"] == "dense" or number < moe.get("dense_layers", 0):
        return DenseNetwork(config.hidden_size, moe["dense_hidden"])
    return (ClusteredMixture if moe["kind"] == "clustered" else StandardMixture)(config)


def _extend_attention(attention: nn.Module, config: MoeDistConfig) -> None:
    """Add biases of queries, keys and values, and norms of queries and keys."""
    model, d, eps = config.section("model"), config.hidden_size, config.rms_norm_eps
    for letter in "qkv":
        width = getattr(attention, f"{letter}_proj").out_features
        linear = nn.Linear(d, width, bias=model["qkv_bias"])
        if letter != "v" and model["qk_norm"] != "none":
            norm = nn.RMSNorm(config.head_dim if model["qk_norm"] == "head" else width, eps=eps)
            setattr(attention, f"{letter}_norm", norm)
            linear = NormedLinear(d, width, model["qkv_bias"], norm)
        setattr(attention, f"{letter}_proj", linear)


def _swiglu(pre: Tensor) -> Tensor:
    """Return silu(gate) * up of [..., gate | up]."""
    gate, up = pre.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the small numbers of packed bytes, the first of a byte in its lowest bits."""
    return torch.stack([packed >> place & (1 << bits) - 1 for place in range(0, 8, bits)], dim=-1).flatten(-2)
