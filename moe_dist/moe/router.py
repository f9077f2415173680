"""The router of clustered experts: one embedding an expert, and the two stages' scores.

Shapes: T tokens, R rows of one cluster, E experts, G clusters, L clusters of a rank, N experts of a cluster, D hidden.
"""

import torch
from torch import Tensor, nn

from moe_dist.config import ModelConfig
from moe_dist.dispatch.all_to_all import AllToAll
from moe_dist.dispatch.traffic_ledger import Payload
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.moe.init_generator import generator
from moe_dist.moe.two_stage_routing import cluster_prototypes, router_logits


class Router(nn.Module):
    """The experts' embeddings, one row an expert by its number, the same on all ranks (dense class).

    A row belongs to its expert wherever that lives: an expert that changes its cluster takes its row into the new
    cluster's prototype.
    """

    def __init__(self, layer: int, experts: int, model: ModelConfig, seed: int) -> None:
        super().__init__()
        rows = [torch.randn(model.hidden_size, generator=generator(seed, layer, "router", e)) for e in range(experts)]
        self.weight_ED = nn.Parameter(torch.stack(rows) * model.init_std)

    def cluster_logits(self, x_TD: Tensor, member_GN: Tensor) -> Tensor:
        """Stage one's scores, [T, G]."""
        return router_logits(x_TD, cluster_prototypes(self.weight_ED, member_GN))

    def local_embeddings(self, placement: ExpertPlacement, member_GN: Tensor, channel: AllToAll, block: int) -> Tensor:
        """embedding_LND: those of the experts of the clusters of block `block`, which stage two scores against.

        The gradient of a cluster's rows is entered by the rank where the cluster started, its *home*: a cluster that
        lives elsewhere gets its rows from there, so that their gradient goes back there. Otherwise the order in which
        ranks' gradients are added, and with it the last bit, would depend on where clusters live.
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
        rows = channel.exchange_rows(sent, send, receive, Payload.ROUTING)
        embedding_LND: Tensor = rows.unflatten(0, (len(here), placement.slots))
        return embedding_LND[[coming.index(c) for c in here]]
