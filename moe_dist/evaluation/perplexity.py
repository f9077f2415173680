"""Perplexity of a language model on a text, equal for any number of ranks."""

from dataclasses import dataclass
from math import exp, inf, log

import torch
import torch.distributed as dist

from moe_dist.distributed.init import RankInfo
from moe_dist.evaluation.texts import EncodedText
from moe_dist.evaluation.trained_model import quantized_as_stored
from moe_dist.evaluation.windows import window_batches
from moe_dist.model.language_model import LanguageModel


@dataclass(frozen=True)
class Perplexity:
    """Loss of a text: `nats` in total, and per token, word and byte.

    End-of-document tokens are predicted too, since their positions are not part of the input. The literature of
    WikiText is word-level, with a token at each line's end that is predicted like a word: `word_perplexity` divides by
    words and line ends (217,646 for the validation split of WikiText-2), `plain_word_perplexity` by words alone, as
    some harnesses do, which gives larger figures.
    """

    nats: float
    tokens: int
    words: int
    lines: int
    bytes: int

    @property
    def loss(self) -> float:
        """Loss in nats per token."""
        return self.nats / self.tokens

    def figures(self) -> dict[str, float]:
        """Return the figures by name, as docs/metrics.md defines them."""
        return {
            "nats": self.nats,
            "tokens": self.tokens,
            "words": self.words,
            "line_ends": self.lines,
            "bytes": self.bytes,
            "loss": self.loss,
            "token_perplexity": _exp(self.loss),
            "word_perplexity": _exp(self.nats / (self.words + self.lines)),
            "plain_word_perplexity": _exp(self.nats / self.words),
            "bits_per_byte": self.nats / log(2) / self.bytes,
        }


def perplexity(
    model: LanguageModel, text: EncodedText, length: int, stride: int, batch: int, process: RankInfo
) -> Perplexity:
    """Score a text by sliding windows; collective.

    Args:
        length: predicted tokens of a window.
        stride: tokens between the starts of windows, from 1 to `length`.
        batch: windows per rank and forward pass.
    """
    total = torch.zeros(2, dtype=torch.float64, device=process.device)
    with model.evaluating(), quantized_as_stored(model):
        for window in window_batches(text.ids, length, stride, process.rank, process.ranks, batch):
            loss_bS = model.token_losses(window.sequence_bS.to(process.device)).double()
            scored_bS = window.scored_bS.to(process.device)
            total += torch.stack([loss_bS[scored_bS].sum(), scored_bS.sum().double()])
    dist.all_reduce(total)
    assert int(total[1]) == len(text.ids) - 1, "every token but the first is scored once"
    return Perplexity(float(total[0]), int(total[1]), text.words, text.lines, text.bytes)


def _exp(value: float) -> float:
    return exp(value) if value < 700 else inf
