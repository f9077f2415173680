"""Description of prepared tokens: sizes, lengths of documents, and decoded samples.

In chats whose template writes the end-of-document token, each message counts as a document here.

Shapes: N documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_dist.data.token_file import TokenFile
from moe_dist.data.tokenizer import Tokenizer

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class TokenReport:
    """Figures of a token file.

    Attributes:
        lengths: tokens of a document at `QUANTILES`, its end included.
        sequences: whole sequences of a length of the model.
        cut_documents: share of the documents that no sequence holds whole.
    """

    tokens: int
    documents: int
    bytes: int
    lengths: tuple[int, ...]
    sequences: int
    cut_documents: float


def report_of(tokens: TokenFile, sequence_length: int) -> TokenReport:
    """Return the figures of a token file whose sequences follow each other without a gap."""
    facts = tokens.facts
    end_N = np.flatnonzero(tokens.plain_ids == facts.end_of_document)
    length_N = np.diff(end_N, prepend=-1)
    first_N = end_N - length_N + 1
    cut_N = first_N // sequence_length != end_N // sequence_length
    return TokenReport(
        tokens=facts.tokens,
        documents=facts.documents,
        bytes=facts.bytes,
        lengths=tuple(int(length) for length in np.quantile(length_N, QUANTILES, method="nearest")),
        sequences=(facts.tokens - 1) // sequence_length,
        cut_documents=float(cut_N.mean()),
    )


def samples_of(tokens: TokenFile, tokenizer: Tokenizer, count: int, characters: int) -> Iterator[str]:
    """Yield the first `characters` of `count` documents, spread evenly over the file."""
    ids = tokens.plain_ids
    end_N = np.flatnonzero(ids == tokens.facts.end_of_document)
    for number in np.unique(np.linspace(0, len(end_N) - 1, count).astype(int)):
        first = int(end_N[number - 1]) + 1 if number else 0
        text = tokenizer.decode(ids[first : min(int(end_N[number]), first + characters)].tolist())
        yield text[:characters]
