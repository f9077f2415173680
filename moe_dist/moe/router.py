"""Router: one embedding per expert, and the logits of standard and of two-stage routing.

Shapes: T tokens, R rows of one cluster, E experts, G clusters, L clusters of a rank, N experts of a cluster, D hidden.
"""

import torch
from torch import Tensor, nn

from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.traffic_ledger import Payload
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.init_generator import SHARED, generator
from moe_dist.moe.layer_context import LayerSizes
from moe_dist.moe.two_stage_routing import cluster_prototypes, router_logits


class Router(nn.Module):
    """Embeddings of the experts: one row per expert number, replicated on all ranks (dense class).

    Rows do not depend on the placement. An expert that changes its cluster contributes its row to the prototype of the
    new cluster.
    """

    def __init__(self, weight_ED: Tensor) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(weight_ED)

    @classmethod
    def of_experts(cls, layer: int, experts: int, sizes: LayerSizes, seed: int) -> "Router":
        """Return a router whose rows are initialized separately, one generator per expert."""
        rows = [torch.randn(sizes.hidden_size, generator=generator(seed, layer, "router", e)) for e in range(experts)]
        return cls(torch.stack(rows) * sizes.init_std)

    @classmethod
    def of_layer(cls, layer: int, experts: int, sizes: LayerSizes, seed: int) -> "Router":
        """Return a router whose rows are initialized together by one generator."""
        # creating a linear layer advances the global generator, on which the initial values of later layers depend
        weight_ED = nn.Linear(sizes.hidden_size, experts, bias=False).weight.data
        return cls(nn.init.normal_(weight_ED, std=sizes.init_std, generator=generator(seed, layer, "router", SHARED)))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the logits of standard routing, [T, E]."""
        return router_logits(x_TD, self.weight_ED)

    def cluster_logits(self, x_TD: Tensor, member_GN: Tensor) -> Tensor:
        """Return the logits of stage one, [T, G]."""
        return router_logits(x_TD, cluster_prototypes(self.weight_ED, member_GN))

    def local_embeddings(
        self, placement: ExpertPlacement, member_GN: Tensor, all_to_all: AllToAll, block: int
    ) -> Tensor:
        """Return embedding_LND of the experts of the clusters of block `block`, for stage two; collective.

        The gradient of a cluster's rows is accumulated on the cluster's initial rank. After a relocation, the cluster's
        current rank therefore receives the rows from the initial rank, and the backward pass returns their gradient to
        it. Otherwise the order in which ranks' gradients are added, and with it the last bit, would depend on the
        placement.
        """
        here = placement.clusters_of_block(block)
        if placement.at_home:
            return self.weight_ED[member_GN[list(here)]]
        leaving = [
            [c for c in placement.clusters_of_block(other) if placement.home_of(c) == block]
            for other in range(placement.blocks)
        ]
        coming = sorted(here, key=placement.home_of)
        send = [placement.slots * len(clusters) for clusters in leaving]
        receive = [
            placement.slots * sum(placement.home_of(c) == other for c in here) for other in range(placement.blocks)
        ]
        sent = self.weight_ED[member_GN[[c for clusters in leaving for c in clusters]]].flatten(0, 1)
        rows = all_to_all.exchange(sent, send, receive, Payload.ROUTING)
        embedding_LND: Tensor = rows.unflatten(0, (len(here), placement.slots))
        return embedding_LND[[coming.index(c) for c in here]]
