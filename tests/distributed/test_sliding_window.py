"""Sliding windows: the mask by hand, and the same losses with parts of sequences and heads on two ranks."""

import pytest
import torch
from torch import Tensor

from moe_dist.config import WorldShape, load_config
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError
from moe_dist.model.document_mask import window_mask
from moe_dist.model.language_model import LanguageModel
from tests.distributed.ranks import run_ranks

END, VOCABULARY = 1, 24
WORDS = [
    "model.hidden_size=32", "model.heads=4", "model.sequence_length=16", "model.init_std=0.2", "model.window=3",
    "model.window_from=1", "moe.experts=4", "moe.clusters=2", "moe.expert_hidden=8", "moe.wire_dtype=float32",
    "train.precision=float32", "corpus.document_mask=true",
]  # fmt: skip


def test_the_mask_by_hand() -> None:
    assert window_mask(4, 2, torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def _losses(*layouts: str) -> list[Tensor]:
    return _losses_with([], *layouts)


def _losses_with(words: list[str], *layouts: str) -> list[Tensor]:
    found = []
    tokens_BS = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
    for layout in layouts:
        context, tensor = (2 if layout == name else 1 for name in ("context", "tensor"))
        config = load_config(None, [*WORDS, *words, f"world.context={context}", f"world.tensor={tensor}"])
        process = init_distributed(config.world)
        shape = WorldShape(1, process.ranks, 1, context=context, tensor=tensor)
        mesh = Mesh.create(shape, process.timeout)
        model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device))
        model.end_of_document = END
        with model.evaluating():
            found.append(model.token_losses(tokens_BS))
    return found


def test_parts_of_sequences_and_heads_see_the_same_window() -> None:
    ((alone,),) = run_ranks(_losses, 1, "plain")
    on_ranks = run_ranks(_losses, 2, "context", "tensor")
    torch.testing.assert_close(torch.cat([found[0] for found in on_ranks], dim=1), alone, rtol=1e-5, atol=1e-5)
    for found in on_ranks:
        torch.testing.assert_close(found[1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["model.kv_heads=2"],
        ["corpus.document_mask=false"],
        ["model.window=null", "model.window_from=0"],
        ["corpus.document_mask=false", "model.window=null", "model.window_from=0"],
    ],
)
def test_flex_attention_hides_the_same(words: list[str]) -> None:
    ((plain,),) = run_ranks(_losses_with, 1, words, "plain")
    ((flex,),) = run_ranks(_losses_with, 1, [*words, "model.attention=flex"], "plain")
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-5)
    on_ranks = run_ranks(_losses_with, 2, [*words, "model.attention=flex"], "context")
    torch.testing.assert_close(torch.cat([found[0] for found in on_ranks], dim=1), plain, rtol=1e-5, atol=1e-5)


def test_a_first_layer_without_a_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.window_from=1 needs model\.window"):
        load_config(None, ["model.window_from=1"])
