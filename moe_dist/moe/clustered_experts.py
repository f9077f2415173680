"""Parameters of the clustered experts of a rank: bases of clusters, and residuals of experts.

Shapes: A rows at a shard, D hidden, F expert hidden, N experts of a cluster on this shard, K chosen experts.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_dist.compression import (
    ClusterWeights,
    GroupFormat,
    QuantizedCluster,
    QuantizedExperts,
    StorageFormat,
    fake_quantize,
    init_base,
    init_residual,
)
from moe_dist.compression.initialization import V_STD
from moe_dist.config import MoEConfig
from moe_dist.kernels import clustered_experts
from moe_dist.memory.offloaded_cluster import OffloadedCluster
from moe_dist.moe.hidden_slices import WHOLE, HiddenSlice
from moe_dist.moe.init_generator import SHARED, generator
from moe_dist.moe.layer_context import LayerContext, LayerSizes
from moe_dist.moe.packed_factors import PackedFactors
from moe_dist.moe.parameter_class import ParameterClass, mark, mark_parameter


class ClusterBase(nn.Module):
    """Base weights that the experts of a cluster share."""

    def __init__(
        self, layer: int, cluster: int, model: LayerSizes, moe: MoEConfig, seed: int, part: HiddenSlice = WHOLE
    ) -> None:
        super().__init__()
        draw = generator(seed, layer, "base", SHARED if moe.shared_init else cluster)
        w_in, w_out = init_base(model.hidden_size, moe.expert_hidden, model.init_std, model.output_init_std, draw)
        self.w_in_DH = nn.Parameter(part.cut("w_in_DH", w_in))
        self.w_out_FD = nn.Parameter(part.cut("w_out_FD", w_out))
        mark(self, ParameterClass.BASE if part.slices == 1 else ParameterClass.EXPERT)


class SharedBase(nn.Module):
    """First level of a two-level base: weights that all clusters of a layer share, the same on all ranks (dense)."""

    def __init__(self, layer: int, model: LayerSizes, moe: MoEConfig, seed: int) -> None:
        super().__init__()
        draw = generator(seed, layer, "base", SHARED)
        w_in, w_out = init_base(model.hidden_size, moe.expert_hidden, model.init_std, model.output_init_std, draw)
        self.w_in_DH = nn.Parameter(w_in)
        self.w_out_FD = nn.Parameter(w_out)


class ClusterPart(nn.Module):
    """Second level of a two-level base: low-rank factors of one cluster, added to the shared base.

    W_c = B + P_c Q_c. The factors start as experts' residuals do: P with std fan_in^-1/2, Q with a small std.
    """

    def __init__(self, layer: int, cluster: int, model: LayerSizes, moe: MoEConfig, seed: int) -> None:
        super().__init__()
        d, f, rank = model.hidden_size, moe.expert_hidden, moe.base_rank
        draw = generator(seed, layer, "cluster part", cluster)
        self.in_p_DR = nn.Parameter(torch.randn(d, rank, generator=draw) * d**-0.5)
        self.in_q_RH = nn.Parameter(torch.randn(rank, 2 * f, generator=draw) * V_STD)
        self.out_p_FR = nn.Parameter(torch.randn(f, rank, generator=draw) * f**-0.5)
        self.out_q_RD = nn.Parameter(torch.randn(rank, d, generator=draw) * V_STD)
        mark(self, ParameterClass.BASE)


class Residuals(nn.Module):
    """Low-rank factors and vectors of a cluster's experts on this shard, stacked by slot.

    Of sliced experts, tensors without a hidden dimension are replicated over the ranks of the block, as a base is.
    """

    def __init__(
        self,
        layer: int,
        experts: tuple[int, ...],
        model: LayerSizes,
        moe: MoEConfig,
        seed: int,
        part: HiddenSlice = WHOLE,
    ) -> None:
        super().__init__()
        shape = (model.hidden_size, moe.expert_hidden, moe.rank, moe.expert_vectors)
        drawn = [init_residual(*shape, generator(seed, layer, "residual", expert)) for expert in experts]

        def stacked(name: str) -> nn.Parameter | None:
            values = [getattr(residual, name) for residual in drawn]
            return None if values[0] is None else nn.Parameter(torch.stack([part.cut(name, one) for one in values]))

        self.in_u_NDR = stacked("in_u_DR")
        self.in_v_NRH = stacked("in_v_RH")
        self.out_u_NFR = stacked("out_u_FR")
        self.out_v_NRD = stacked("out_v_RD")
        self.hidden_gate_NF = stacked("hidden_gate_F")
        self.hidden_bias_NH = stacked("hidden_bias_H")
        self.output_bias_ND = stacked("output_bias_D")
        mark(self, ParameterClass.EXPERT)
        if part.slices > 1:
            for whole in (self.in_u_NDR, self.out_v_NRD, self.output_bias_ND):
                if whole is not None:
                    mark_parameter(whole, ParameterClass.BASE)
        self.part = part
        self.packed: PackedFactors | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the values of the forward pass by their names in `ClusterWeights`."""
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        if self.part.slices > 1 and "output_bias_ND" in parameters:
            # one rank adds it to the sum of the slices; all have the same graph, since ZeRO 2 puts gradients into its
            # buckets in the order of the backward pass
            parameters["output_bias_ND"] = parameters["output_bias_ND"] * float(self.part.number == 0)
        return parameters if self.packed is None else {**parameters, **self.packed.tensors()}

    def pack(self, form: GroupFormat, dtype: torch.dtype) -> PackedFactors:
        """Keep the factors quantized from now on, and leave placeholders as parameters."""
        self.packed = PackedFactors(dict(self.named_parameters()), form, dtype)
        return self.packed


class ClusteredExperts(nn.Module):
    """Base of one cluster, and its experts on this rank."""

    def __init__(
        self,
        layer: int,
        cluster: int,
        model: LayerSizes,
        moe: MoEConfig,
        context: LayerContext,
        shared: SharedBase | None = None,
    ) -> None:
        """Args: shared: first level of a two-level base, owned by the layer; None: a base for each cluster."""
        super().__init__()
        experts = context.placements[layer].experts_of(cluster, context.mesh.at.shard)
        self.backend: str = moe.backend
        self.fake_quantize_as = context.fake_quantize_as
        self._shared = (shared,)  # in a tuple, so that it is no module of this one
        mesh = context.mesh
        part = HiddenSlice(mesh.at.shard, mesh.shape.shard) if mesh.shape.sliced else WHOLE
        if shared is None:
            self.base: ClusterBase | ClusterPart = ClusterBase(layer, cluster, model, moe, context.seed, part)
        else:
            self.base = ClusterPart(layer, cluster, model, moe, context.seed)
        self.residuals = Residuals(layer, experts, model, moe, context.seed, part)
        self._offloaded: OffloadedCluster | None = None
        if context.memory is not None:
            local = context.placements[layer].local_index(cluster)
            self._offloaded = context.memory.adopt(layer, local, dict(self.named_parameters()))

    def weights(self) -> ClusterWeights:
        """Return the weights of the forward pass: the parameters, or their fake-quantized values.

        Those of an offloaded cluster can be read only within `present`.
        """
        weights = self.parameter_weights()
        return weights if self.fake_quantize_as is None else fake_quantize(weights, self.fake_quantize_as)

    def parameter_weights(self) -> ClusterWeights:
        """Return the parameters; a two-level base is materialized, and differentiable in both of its levels."""
        (shared,) = self._shared
        if isinstance(self.base, ClusterBase):
            return ClusterWeights(self.base.w_in_DH, self.base.w_out_FD, **self.residuals.tensors())
        assert shared is not None
        w_in_DH = torch.addmm(shared.w_in_DH, self.base.in_p_DR, self.base.in_q_RH)
        w_out_FD = torch.addmm(shared.w_out_FD, self.base.out_p_FR, self.base.out_q_RD)
        return ClusterWeights(w_in_DH, w_out_FD, **self.residuals.tensors())

    def quantized(self, form: StorageFormat) -> QuantizedCluster:
        """Return the cluster as it is stored; factors that are trained quantized are returned as they are."""
        weights, packed = self.parameter_weights(), self.residuals.packed
        made = QuantizedCluster.of(weights, form)
        if packed is None:
            return made
        return replace(made, experts=QuantizedExperts(packed.factors, made.experts.vectors))

    def present(self) -> AbstractContextManager[None]:
        """Return a context in which the weights are on the device."""
        return nullcontext() if self._offloaded is None else self._offloaded.weights()

    def forward(self, x_AD: Tensor, slot_AK: Tensor, gate_AK: Tensor) -> Tensor:
        """Return the gated sum [A, D] over the chosen experts of this shard; slots of other shards are -1."""
        if self._offloaded is None:
            return clustered_experts(x_AD, slot_AK, gate_AK, self.weights(), self.backend)
        if not len(x_AD):
            self._offloaded.skip()
            return x_AD + gate_AK.sum(1, keepdim=True).to(x_AD.dtype)  # no rows; connect the inputs to autograd

        def compute(x_AD: Tensor, gate_AK: Tensor) -> Tensor:
            return clustered_experts(x_AD, slot_AK, gate_AK, self.weights(), self.backend)

        return self._offloaded.run(compute, len(x_AD), x_AD, gate_AK)
