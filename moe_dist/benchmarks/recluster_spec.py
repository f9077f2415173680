"""Specification of the re-clustering benchmark; imports no torch, so that a refusal is immediate."""

from dataclasses import dataclass

from moe_dist.benchmarks.layer.spec import CLUSTERS, EXPERTS, RANK, REPEATS, SEED, THREADS
from moe_dist.errors import ConfigError
from moe_dist.launch.options import option


@dataclass(frozen=True)
class ReclusterBenchSpec:
    """Benchmark of the parts of a re-clustering round.

    Attributes:
        sampled: members of the cluster that are factorised; the time of the whole cluster is extrapolated.
    """

    experts: tuple[int, ...] = option((32, 64, 128, 256), f"{EXPERTS[:-1]}; may be given again.")
    hidden: tuple[int, ...] = option((128, 512, 2048), "d = f: width of experts; may be given again.")
    clusters: int = option(8, CLUSTERS)
    rank: int = option(8, RANK)
    tokens: int = option(256, "Tokens per expert that whitening is fitted to.")
    sampled: int = 4
    repeats: int = option(5, REPEATS)
    threads: int = option(1, THREADS)
    seed: int = option(0, SEED)

    def __post_init__(self) -> None:
        """Check that the specification can be measured."""
        for name in ("clusters", "rank", "tokens", "sampled", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        for experts in self.experts:
            if experts < 1 or experts % self.clusters:
                raise ConfigError(f"experts={experts} is not divisible by clusters={self.clusters}")
        for hidden in self.hidden:
            if hidden < self.rank:
                raise ConfigError(f"hidden={hidden} must be at least rank={self.rank}")
