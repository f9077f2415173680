"""Options of `moe-dist import`; imports no torch, so that a refusal is immediate."""

from dataclasses import dataclass
from pathlib import Path

from moe_dist.launch.options import option


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import beside the settings of its run."""

    noise: float = option(
        0.01, "Noise on copies of a dense network as standard experts, over their deviation.", minimum=0.0
    )
    text: tuple[str, ...] = option(
        (), "Calibration text of a compression, as corpus.paths. Default: Python's library source."
    )
    tokens: int = option(32768, "Calibration tokens of a compression.", minimum=256)
    keep: float | None = option(
        None, "Compress a mixture to this share of its expert parameters, by moe.rank.", minimum=0.001, maximum=1.0
    )


@dataclass(frozen=True)
class ImportSpec:
    """Import of one model.

    Attributes:
        source: folder of config.json and safetensors, a GGUF file, or a model's name on the Hugging Face hub.
        target: folder of the run to write.
        words: `key.sub=value` settings of the run.
    """

    source: Path
    target: Path
    words: tuple[str, ...] = ()
    options: ImportOptions = ImportOptions()
