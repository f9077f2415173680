"""A document among others is computed as if it were alone."""

import pytest
import torch
from torch import Tensor

from moe_dist.config import load_config
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.model.document_mask import document_mask
from moe_dist.model.language_model import LanguageModel
from tests.distributed.ranks import run_ranks

END, VOCABULARY = 1, 53
SMALL = [
    "model.hidden_size=32", "model.heads=4", "model.kv_heads=2", "model.sequence_length=32", "moe.experts=8",
    "moe.clusters=2", "moe.expert_hidden=16", "moe.rank=2", "moe.wire_dtype=float32", "train.precision=float32",
    "model.init_std=0.1",
]  # fmt: skip
KINDS = {
    "dense": ["moe.kind=dense"],
    "standard": ["moe.kind=standard"],
    "clustered, m=1": ["moe.kind=clustered"],
    "clustered, m=2": ["moe.kind=clustered", "moe.top_clusters=2"],
}


def test_the_mask_by_hand() -> None:
    tokens_BS = torch.tensor([[5, END, 6, 7], [END, END, 4, 4]])
    first = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]  # the end belongs to what it ends
    second = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]  # two empty documents
    assert document_mask(tokens_BS, END).tolist() == torch.tensor([[first], [second]]).bool().tolist()


def _losses_and_gradients(words: list[str]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Of documents alone, each from position 0, and of all in one sequence."""
    config = load_config(None, [*SMALL, *words])
    init_distributed(config.world)
    model = LanguageModel(config, VOCABULARY, Mesh.alone(), Links.alone())
    model.end_of_document = END
    draw = torch.Generator().manual_seed(0)
    documents = [
        torch.cat([torch.randint(2, VOCABULARY, (n,), generator=draw), torch.tensor([END])]) for n in (9, 4, 12)
    ]
    together = torch.cat(documents)
    alone = []
    for document, following in zip(documents, [*documents[1:], torch.tensor([7])], strict=True):
        sequence_BS = torch.cat([document, following[:1]])[None]
        alone.append(model.token_losses(sequence_BS)[0])
    packed_S = model.token_losses(torch.cat([together, torch.tensor([7])])[None])[0]
    losses = [torch.cat(alone), packed_S]
    gradients = []
    for loss_S in losses:
        model.zero_grad()
        loss_S.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return [loss_S.detach() for loss_S in losses], gradients


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_computed_as_if_alone(kind: str) -> None:
    ((losses, gradients),) = run_ranks(_losses_and_gradients, 1, [*KINDS[kind], "corpus.document_mask=true"])
    assert torch.allclose(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    alone, packed = gradients
    if kind == "clustered, m=1":
        return  # the gradient of a single cluster's gate is an advantage over the mean of a sequence (ADR 5)
    for name, gradient in alone.items():
        assert torch.allclose(gradient, packed[name], rtol=1e-4, atol=1e-5), name


def test_without_the_mask_tokens_attend_to_other_documents() -> None:
    ((losses, _),) = run_ranks(_losses_and_gradients, 1, KINDS["dense"])
    assert torch.allclose(losses[0][:10], losses[1][:10], rtol=1e-6, atol=1e-6)
    assert (losses[0][10:] - losses[1][10:]).abs().max() > 1e-3
