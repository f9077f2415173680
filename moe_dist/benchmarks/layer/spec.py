"""Specifications of the layer benchmarks; imports no torch, so that a refusal is immediate."""

from dataclasses import dataclass, replace

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError
from moe_dist.launch.options import nested, option

DTYPES = ("float32", "bfloat16")
LIBRARIES = ("deepspeed", "megatron")
LATENT = "latentmoe"
PEERS = (*LIBRARIES, LATENT)
"""Layers of other libraries with the standard layer's sizes, and LatentMoE (arXiv 2601.18089) by Megatron-core."""
CLUSTERED = {"clustered m=1": 1, "clustered m=2": 2}
"""Name of each of our layers in the tables -> clusters per token."""
MOST_CHUNKS = 64


def overlapped(chunks: str) -> str:
    """Return the name of the top-1 layer whose dispatch is overlapped in so many chunks."""
    return f"clustered m=1, overlap {chunks}"


TOKENS = "Tokens in the batch; with --ranks: of each rank."
WIDTH = "d: width of the model."
EXPERT_WIDTH = "f: hidden width of an expert."
EXPERTS = "E: experts in the layer."
CLUSTERS = "G: clusters of experts."
RANK = "r: rank of an expert's residual."
THREADS = "CPU threads per process."
REPEATS = "Timed rounds; the median is reported."
SEED = "Seed of weights and tokens."


@dataclass(frozen=True)
class LayerShape:
    """One feed-forward layer and the number of tokens that a rank gives it."""

    tokens: int = option(2048, TOKENS)
    hidden: int = option(512, WIDTH)
    expert_hidden: int = option(1408, EXPERT_WIDTH)
    experts: int = option(32, EXPERTS)
    clusters: int = option(4, CLUSTERS)
    rank: int = option(8, RANK)
    vectors: bool = option(False, "Experts with per-expert vectors.")
    backend: str = option("auto", "Kernel of clustered experts, as moe.backend.")
    wire_dtype: str | None = option(None, "With --ranks: as moe.wire_dtype. Default: --dtype.")
    seed: int = option(0, SEED)

    def config(self, kind: str, dtype: str, top_k: int, top_clusters: int = 1) -> RunConfig:
        """Return the configuration of a model of this one layer; `dense` is as wide as one expert.

        Raises:
            ConfigError: the sizes do not go together.
        """
        moe = {
            "kind": kind,
            "experts": self.experts,
            "clusters": self.clusters,
            "top_clusters": top_clusters,
            "top_k": top_k,
            "expert_hidden": self.expert_hidden,
            "dense_hidden": self.expert_hidden,
            "rank": self.rank,
            "expert_vectors": self.vectors,
            "backend": self.backend,
            "wire_dtype": self.wire_dtype or dtype,
        }
        model = {"layers": 1, "heads": 1, "hidden_size": self.hidden}
        tree = {"seed": self.seed, "model": model, "moe": moe, "train": {"precision": dtype}}
        try:
            return RunConfig.model_validate(tree)
        except ValueError as error:
            raise ConfigError(f"no such layer: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class LayerBenchSpec:
    """Benchmark of one layer's experts in this process, on routing drawn beforehand."""

    tokens: int = option(4096, TOKENS)
    hidden: int = option(512, WIDTH)
    expert_hidden: int = option(1408, EXPERT_WIDTH)
    experts: int = option(32, EXPERTS)
    clusters: int = option(4, CLUSTERS)
    rank: int = option(8, RANK)
    top_k: tuple[int, ...] = option((1, 2, 4), "k: experts per token; may be given again.")
    dtypes: tuple[str, ...] = option(
        ("float32", "bfloat16"), "float32 or bfloat16; may be given again.", flag="--dtype"
    )
    threads: int = option(1, THREADS)
    repeats: int = option(7, REPEATS)
    vectors: bool = option(False, "Experts with per-expert vectors.")
    backend: str = option("auto", "Kernel of clustered experts, as moe.backend.")
    backends: tuple[str, ...] = option(
        (), "Without --ranks: another kernel to time; may be given again.", flag="--also-backend"
    )
    device: str = option("cpu", "Without --ranks: device, such as cuda.")
    seed: int = option(0, SEED)

    def __post_init__(self) -> None:
        """Check sizes and data types."""
        for name in ("tokens", "hidden", "expert_hidden", "experts", "clusters", "rank", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.experts % self.clusters:
            raise ConfigError(f"experts={self.experts} is not divisible by clusters={self.clusters}")
        for top_k in self.top_k:
            if not 1 <= top_k <= self.experts // self.clusters:
                raise ConfigError(f"top_k={top_k} must be in 1..{self.experts // self.clusters}, a cluster's experts")
        if unknown := sorted(set(self.dtypes) - set(DTYPES)):
            raise ConfigError(f"dtype {unknown[0]!r} is unknown: use {' or '.join(DTYPES)}")


@dataclass(frozen=True)
class RanksBenchSpec:
    """Benchmark of whole layers, with routers, on several ranks.

    Attributes:
        json_file: file that also receives the figures.
    """

    shape: LayerShape = LayerShape()
    top_k: tuple[int, ...] = option((2, 4), "k: experts per token; may be given again.")
    dtypes: tuple[str, ...] = option(("float32",), "float32 or bfloat16; may be given again.", flag="--dtype")
    peers: tuple[str, ...] = option(
        (),
        "With --ranks, other libraries' layers too: deepspeed,megatron; latentmoe: Megatron-core's LatentMoE with as "
        "many parameters in experts as clustered has.",
        flag="--peers",
    )
    overlap: tuple[str, ...] = option(
        (), "With --ranks: the top-1 layer also with moe.overlap_chunks=auto or a number; may be given again."
    )
    routing: tuple[str, ...] = option(
        (),
        "With --ranks: a record of `measure routing`, which layers of its kind replay; may be given again.",
    )
    repeats: int = option(7, REPEATS)
    json_file: str | None = None

    def check(self, ranks: int) -> None:
        """Check that the specification can be measured on so many ranks.

        Raises:
            ConfigError: it cannot; one line with key, value and reason.
        """
        shape = self.shape
        for name, value in (("tokens", shape.tokens), ("repeats", self.repeats)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more")
        if unknown := sorted(set(self.dtypes) - set(DTYPES)):
            raise ConfigError(f"dtype {unknown[0]!r} is unknown: use {' or '.join(DTYPES)}")
        if unknown := sorted(set(self.peers) - set(PEERS)):
            raise ConfigError(f"peer {unknown[0]!r} is unknown: use {' or '.join(PEERS)}")
        for chunks in self.overlap:
            if chunks != "auto" and not (chunks.isdigit() and 1 < int(chunks) <= MOST_CHUNKS):
                raise ConfigError(f"overlap={chunks} must be auto, or a number of chunks from 2 to {MOST_CHUNKS}")
        for name, value in (("experts", shape.experts), ("clusters", shape.clusters)):
            if value % ranks:
                raise ConfigError(f"{name}={value} cannot be divided over {ranks} ranks")
        for top_k in self.top_k:
            shape.config("standard", self.dtypes[0], top_k)
            for top_clusters in CLUSTERED.values():
                shape.config("clustered", self.dtypes[0], top_k, top_clusters)


def clusters_for(experts: int) -> int:
    """Return G: the largest power of two up to sqrt(2E) that divides E."""
    clusters = 1 << ((2 * experts).bit_length() - 1) // 2
    while experts % clusters:
        clusters //= 2
    return clusters


@dataclass(frozen=True)
class GrowthSpec:
    """Benchmark of layers with more and more experts; `shape.experts` and `shape.clusters` are not used."""

    shape: LayerShape = nested(LayerShape(), "clusters", "wire_dtype")
    experts: tuple[int, ...] = option((16, 32, 64, 128, 256), f"{EXPERTS[:-1]}; may be given again.")
    top_k: int = option(2, "k: experts per token.")
    dtype: str = option("float32", "float32 or bfloat16.")
    threads: int = option(1, THREADS)
    repeats: int = option(5, REPEATS)
    standard_up_to: int = option(256, "Largest number of experts of the standard layer.")

    def check(self) -> None:
        """Check that the specification can be measured.

        Raises:
            ConfigError: it cannot; one line with key, value and reason.
        """
        for name, value in (("tokens", self.shape.tokens), ("repeats", self.repeats), ("threads", self.threads)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown: use {' or '.join(DTYPES)}")
        if list(self.experts) != sorted(set(self.experts)):
            raise ConfigError(f"experts={','.join(map(str, self.experts))} must grow")
        if self.experts[0] < 1:
            raise ConfigError(f"experts={self.experts[0]} must be 1 or more")
        for experts in self.experts:
            shape = replace(self.shape, experts=experts, clusters=clusters_for(experts))
            for top_clusters in CLUSTERED.values():
                shape.config("clustered", self.dtype, self.top_k, top_clusters)
