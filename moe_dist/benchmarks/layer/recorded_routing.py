"""Recorded routing of a trained model, and its replay in any layer with a linear router.

An untrained router sends random tokens almost evenly; a trained one does not. A record holds the experts that each
token of a text chose in one layer. It is replayed by inputs: the router's rows are orthonormal vectors w_e, and a
token is noise orthogonal to them plus a sum over its experts, a_1 w_(e_1) + a_2 w_(e_2) + ... with a_1 > a_2 > 0. So
the logit of a chosen expert is a_j and all others are 0, in our layers as in other libraries'; that of a cluster is
the sum of the a_j of its experts, over the square root of its size.

Shapes: T tokens, C chosen experts of a token (m * k, cluster by cluster), E experts, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_dist.config import MoEConfig, WorldConfig
from moe_dist.data.files import FileSource
from moe_dist.distributed.init import init_distributed, shutdown
from moe_dist.errors import ConfigError
from moe_dist.evaluation.texts import encode_text
from moe_dist.evaluation.trained_model import open_evaluated_model
from moe_dist.evaluation.windows import window_batches
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.scoring import Scoring
from moe_dist.moe.standard_moe import StandardMoE
from moe_dist.moe.two_stage_routing import choose_clusters, choose_experts, router_logits

BATCH = 8
"""Windows of text at a time."""
FACTS = ("kind", "experts", "clusters", "top_clusters", "top_k")


@dataclass(frozen=True)
class RoutingRecord:
    """Choices of one layer.

    Attributes:
        facts: `kind`, `experts`, `clusters`, `top_clusters` and `top_k` of the layer.
        expert_TC: chosen experts, those of a cluster numbered in a row.
    """

    facts: Mapping[str, str | int]
    expert_TC: npt.NDArray[np.int64]

    def write(self, path: Path) -> None:
        """Write the record as a NumPy archive."""
        facts: dict[str, Any] = {name: np.array(value) for name, value in self.facts.items()}
        with path.open("wb") as file:
            np.savez_compressed(file, expert_TC=self.expert_TC.astype(np.int32), **facts)

    @classmethod
    def read(cls, path: Path) -> "RoutingRecord":
        """Read a record.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                facts = {name: arrays[name].item() for name in FACTS}
                return cls(facts, arrays["expert_TC"].astype(np.int64))
        except FileNotFoundError as error:
            raise ConfigError(f"--routing {path} does not exist: write it with `moe-dist measure routing`") from error
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ConfigError(f"--routing {path} is no record of `moe-dist measure routing`: {error}") from error

    def loads(self) -> list[int]:
        """Return the number of copies of each expert."""
        counts: list[int] = np.bincount(self.expert_TC.ravel(), minlength=int(self.facts["experts"])).tolist()
        return counts

    def suits(self, kind: str, moe: MoEConfig) -> bool:
        """Return True if a layer makes choices of this kind."""
        wanted: dict[str, str | int] = {"kind": kind, "experts": moe.experts, "top_k": moe.top_k}
        if kind == "clustered":
            wanted |= {"clusters": moe.clusters, "top_clusters": moe.top_clusters}
        return all(self.facts[name] == value for name, value in wanted.items())

    def inputs(self, tokens: int, hidden: int, rank: int, ranks: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of a rank, x_TD, and the router's rows, weight_ED, the same on all ranks.

        Raises:
            ConfigError: the record is too short, or there are more experts than dimensions.
        """
        experts = int(self.facts["experts"])
        if len(self.expert_TC) < tokens * ranks:
            raise ConfigError(
                f"--routing: {len(self.expert_TC)} tokens are recorded, and {ranks} ranks of {tokens} need "
                f"{tokens * ranks}: record more text, or lower --tokens"
            )
        if experts > hidden:
            raise ConfigError(f"--routing needs a width of at least the {experts} experts, --hidden is {hidden}")
        shared = torch.Generator().manual_seed(seed)
        weight_ED = torch.linalg.qr(torch.randn(hidden, experts, generator=shared)).Q.T.contiguous()
        x_TD = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed * 1009 + rank))
        x_TD -= (x_TD @ weight_ED.T) @ weight_ED
        expert_TC = torch.from_numpy(self.expert_TC[rank * tokens : (rank + 1) * tokens])
        for column, expert_T in enumerate(expert_TC.T):
            x_TD += (1 + expert_TC.shape[1] - column) * weight_ED[expert_T]
        return x_TD, weight_ED


def record_routing(run: Path, text: Path, layer: int) -> RoutingRecord:
    """Route a text through a trained model and return the choices of one of its layers of experts.

    Args:
        layer: number among the layers of experts; negative: from the last.

    Raises:
        ConfigError: the model has no such layer.
        CheckpointError: the run has no weights.
    """
    process = init_distributed(WorldConfig())
    try:
        subject = open_evaluated_model(run, process, WorldConfig(), "float32")
        model, config = subject.model(torch.float32), subject.config
        found = [module for module in model.modules() if isinstance(module, ClusteredMoE | StandardMoE)]
        if not -len(found) <= layer < len(found):
            raise ConfigError(f"--layer {layer}: {run} has {len(found)} layers of experts")
        chosen: list[Tensor] = []
        hook = found[layer].register_forward_pre_hook(lambda module, inputs: chosen.append(_choices(module, inputs[0])))
        ids, length = encode_text(FileSource((text,), "text"), subject.tokenizer).ids, config.model.sequence_length
        with hook, model.evaluating():
            for window in window_batches(ids, length, length, 0, 1, BATCH):
                model.token_losses(window.sequence_bS.to(process.device))
    finally:
        shutdown()
    facts = {name: getattr(config.moe, name) for name in FACTS}
    return RoutingRecord(facts, torch.cat(chosen).cpu().numpy())


@torch.no_grad()
def _choices(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Return expert_TC of a layer for its input."""
    x_TD = hidden.flatten(0, -2)
    if isinstance(layer, StandardMoE):
        return layer.route(layer.router.logits(x_TD))[0].expert_TK
    assert isinstance(layer, ClusteredMoE)
    moe, balance, members = layer.moe, layer.balance, layer.member_GN
    logits_TG = layer.router.cluster_logits(x_TD, members)
    cluster_TM = choose_clusters(logits_TG, balance.cluster_bias_LG[layer.layer], moe.top_clusters)
    found_TMK = torch.empty(*cluster_TM.shape, moe.top_k, dtype=torch.int64, device=x_TD.device)
    for cluster, member_N in enumerate(members):
        here_TM = cluster_TM == cluster
        rows = here_TM.nonzero()[:, 0]
        logits_RN = router_logits(x_TD[rows], layer.router.weight_ED[member_N])
        bias_N = balance.expert_bias_LE[layer.layer][member_N]
        slot_RK = choose_experts(logits_RN, bias_N, moe.top_k, False, scoring=Scoring.of(moe)).slot_RK
        found_TMK[here_TM] = cluster * len(member_N) + slot_RK
    return found_TMK.flatten(1)
