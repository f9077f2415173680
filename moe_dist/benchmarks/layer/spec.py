"""What the benches of whole layers are asked for; no torch here, so that a refusal comes at once."""

from dataclasses import dataclass, replace
from typing import Any, Self

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError

DTYPES = ("float32", "bfloat16")
PEERS = ("deepspeed", "megatron")
CLUSTERED = {"clustered m=1": 1, "clustered m=2": 2}
"""Name of each of our layers in the tables, and the clusters a token goes to."""
MOST_CHUNKS = 64


def overlapped(chunks: str) -> str:
    """Name of the layer of one cluster a token that travels in so many chunks."""
    return f"clustered m=1, overlap {chunks}"


@dataclass(frozen=True)
class LayerShape:
    """One feed-forward layer and the tokens a rank gives it."""

    tokens: int = 2048
    hidden: int = 512
    expert_hidden: int = 1408
    experts: int = 32
    clusters: int = 4
    rank: int = 8
    vectors: bool = False
    backend: str = "auto"
    wire_dtype: str | None = None
    seed: int = 0

    def config(self, kind: str, dtype: str, top_k: int, top_clusters: int = 1) -> RunConfig:
        """The configuration of a model of this one layer; `dense` is as wide as one expert.

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
class RanksBenchSpec:
    """What `moe-dist bench layer --ranks` measures.

    Attributes:
        overlap: values of `moe.overlap_chunks` that the layer of one cluster a token is measured with besides 1.
    """

    shape: LayerShape = LayerShape()
    top_k: tuple[int, ...] = (2, 4)
    dtypes: tuple[str, ...] = ("float32",)
    peers: tuple[str, ...] = ()
    overlap: tuple[str, ...] = ()
    repeats: int = 7
    json_file: str | None = None

    @classmethod
    def from_words(cls, words: dict[str, Any]) -> Self:
        """From `asdict`, after a way through JSON."""
        lists = {name: tuple(value) for name, value in words.items() if isinstance(value, list)}
        return cls(**{**words, **lists, "shape": LayerShape(**words["shape"])})

    def check(self, ranks: int) -> None:
        """Refuses what cannot be measured on so many ranks.

        Raises:
            ConfigError: in one line, what and why.
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
    """G: the largest power of two up to sqrt(2E) that divides E."""
    clusters = 1 << ((2 * experts).bit_length() - 1) // 2
    while experts % clusters:
        clusters //= 2
    return clusters


@dataclass(frozen=True)
class GrowthSpec:
    """What `moe-dist bench growth` measures; `shape.experts` and `shape.clusters` are what grows."""

    shape: LayerShape = LayerShape()
    experts: tuple[int, ...] = (16, 32, 64, 128, 256)
    top_k: int = 2
    dtype: str = "float32"
    threads: int = 1
    repeats: int = 5
    standard_up_to: int = 256

    def check(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            ConfigError: in one line, what and why.
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
