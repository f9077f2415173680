"""Classification or regression head on a trained language model, on the state of the last token.

Shapes: B sentences, W tokens of the longest, C outputs (classes, or one number), D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.data import Tokenizer
from moe_dist.evaluation.glue_data import Example
from moe_dist.evaluation.glue_tasks import STS_B_HIGHEST as SCALE
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.megatron_backbone import hidden_states

EXTRA_COLUMNS = 2
"""Columns of a packed batch after the tokens: index of the last token, and bits of the label."""


@dataclass(frozen=True)
class Encoded:
    """A sentence (pair) as tokens, and its label."""

    tokens: list[int]
    label: float


def encode(example: Example, tokenizer: Tokenizer, longest: int) -> Encoded:
    """Encode as end of document, the sentences separated by a line end, end of document; truncated to `longest`.

    Documents have this form in training, and the state of the last token depends on all of it. Of two sentences the
    longer one is truncated first.

    Args:
        longest: limit of all tokens together.
    """
    parts = [tokenizer.encode(sentence) for sentence in example.sentences]
    between = tokenizer.encode("\n") if len(parts) > 1 else []
    lengths = _cut([len(part) for part in parts], longest - 2 - len(between))
    first, *second = [part[:length] for part, length in zip(parts, lengths, strict=True)]
    end = tokenizer.end_of_document
    return Encoded([end, *first, *between, *(second[0] if second else []), end], example.label)


def _cut(lengths: list[int], room: int) -> list[int]:
    """Return the lengths that together fit, truncating the longest first."""
    while sum(lengths) > max(0, room):
        lengths[lengths.index(max(lengths))] -= 1
    return lengths


def pack(sentences: Sequence[Encoded], width: int) -> Tensor:
    """Pack a batch into one int64 tensor [B, W + EXTRA_COLUMNS], the input of the training engine.

    Args:
        width: W; shorter sentences are padded with their last token, which causal attention ignores.
    """
    tokens_BW = torch.tensor([[*s.tokens, *s.tokens[-1:] * (width - len(s.tokens))] for s in sentences])
    last_B = torch.tensor([len(s.tokens) - 1 for s in sentences])
    label_B = torch.tensor([s.label for s in sentences], dtype=torch.float64).view(torch.int64)
    return torch.cat([tokens_BW, last_B[:, None], label_B[:, None]], dim=1)


class SentenceModel(LanguageModel):
    """Language model with a linear head; it takes over the parts of the trained one."""

    def __init__(self, language: LanguageModel, classes: int | None, seed: int) -> None:
        """Add a head to a language model.

        Args:
            classes: number of classes; None: one number, scaled to mean 0 to 5 (STS-B).
        """
        nn.Module.__init__(self)
        self.config, self.vocab_size, self.context = language.config, language.vocab_size, language.context
        self.gpt, self.classes, self.sequence_losses = language.gpt, classes, []
        self.stage, self._links, self.tied = language.stage, language._links, language.tied
        if not language.config.model.tie_embeddings:
            self.gpt.output_layer.requires_grad_(False)  # unused here
        draw = torch.Generator().manual_seed(seed)
        weight_CD = torch.empty(classes or 1, language.config.model.hidden_size)
        nn.init.normal_(weight_CD, std=language.config.model.init_std, generator=draw)
        like = next(language.parameters())
        self.head_CD = nn.Parameter(weight_CD.to(like))

    def forward(self, packed_B: Tensor) -> Tensor:
        """Return the mean loss over a packed batch: cross-entropy, or squared error."""
        out_BC, label_B = self.outputs(packed_B), packed_B[:, -1].view(torch.float64)
        if self.classes is None:
            return functional.mse_loss(out_BC[:, 0], label_B.to(out_BC.dtype) / SCALE)
        return functional.cross_entropy(out_BC, label_B.long())

    def outputs(self, packed_B: Tensor) -> Tensor:
        """Return logits, or one number in units of `SCALE`, float32 [B, C]."""
        tokens_BW, last_B = packed_B[:, :-EXTRA_COLUMNS].contiguous(), packed_B[:, -EXTRA_COLUMNS]
        hidden_BWD = hidden_states(self.gpt, tokens_BW)
        hidden_BD = hidden_BWD[torch.arange(len(last_B), device=last_B.device), last_B]
        return (hidden_BD @ self.head_CD.T).float()
