"""Perplexity: its figures by hand, from a model whose probabilities are known."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dist.config import RunConfig, WorldConfig
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.evaluation.perplexity import Perplexity, perplexity
from moe_dist.evaluation.texts import EncodedText
from moe_dist.model.language_model import LanguageModel


class Bigrams:
    """p(next | last): an even number is followed by its successor with 1/2, all else has 1/8."""

    config = RunConfig()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def token_losses(self, sequence_BS: Tensor) -> Tensor:
        before, after = sequence_BS[:, :-1], sequence_BS[:, 1:]
        likely = (before % 2 == 0) & (after == before + 1)
        return torch.where(likely, log(2), log(8)).float()


@pytest.fixture
def process() -> Iterator[RankInfo]:
    yield init_distributed(WorldConfig(backend="gloo", timeout_seconds=60))
    shutdown()


@pytest.mark.parametrize(("length", "stride", "batch"), [(2, 1, 1), (2, 2, 3), (4, 2, 2), (9, 3, 1)])
def test_by_hand_whatever_the_windows(process: RankInfo, length: int, stride: int, batch: int) -> None:
    ids = np.array([0, 1, 2, 3, 5, 4, 5, 0])
    text = EncodedText(ids, documents=1, words=4, lines=1, bytes=20, source="by hand")
    found = perplexity(cast(LanguageModel, Bigrams()), text, length, stride, batch, process)
    # 0>1 and 2>3 and 4>5 cost log 2; 1>2, 3>5, 5>4 and 5>0 cost log 8
    nats = 3 * log(2) + 4 * log(8)
    assert found.nats == pytest.approx(nats, rel=1e-6)
    figures = found.figures()
    assert figures["tokens"] == 7
    assert figures["loss"] == pytest.approx(15 * log(2) / 7, rel=1e-6)
    assert figures["token_perplexity"] == pytest.approx(2 ** (15 / 7), rel=1e-6)
    assert figures["word_perplexity"] == pytest.approx(2 ** (15 / 5), rel=1e-6)
    assert figures["plain_word_perplexity"] == pytest.approx(2 ** (15 / 4), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(15 / 20, rel=1e-6)


def test_an_overflow_is_infinite() -> None:
    figures: dict[str, Any] = Perplexity(1e6, 10, 10, 0, 10).figures()
    assert figures["token_perplexity"] == float("inf")
