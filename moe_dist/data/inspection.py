"""Description of prepared tokens: sizes, lengths of documents, and decoded samples.

In chats whose template writes the end-of-document token, each message counts as a document here.

Shapes: N documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_dist.data.packing import PackedSequences
from moe_dist.data.sequences import Sequences
from moe_dist.data.token_file import TokenFile
from moe_dist.data.tokenizer import Tokenizer

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class TokenReport:
    """Figures of a token file.

    Attributes:
        lengths: tokens of a document at `QUANTILES`, its end included.
        sequences: sequences that are made of them.
        cut_documents: share of the documents that no sequence holds whole.
        padding: share of the ids of all sequences that are padding.
    """

    tokens: int
    documents: int
    bytes: int
    lengths: tuple[int, ...]
    sequences: int
    cut_documents: float
    padding: float


def report_of(tokens: TokenFile, sequences: Sequences, sequence_length: int) -> TokenReport:
    """Return the figures of a token file and of the sequences that are made of it."""
    first_N, length_N = _documents(tokens)
    padding, cut = 0.0, float((first_N // sequence_length != (first_N + length_N - 1) // sequence_length).mean())
    if isinstance(sequences, PackedSequences):
        padding, cut = sequences.facts.padding, sequences.facts.cut_documents / sequences.facts.documents
    return TokenReport(
        tokens=tokens.facts.tokens,
        documents=tokens.facts.documents,
        bytes=tokens.facts.bytes,
        lengths=tuple(int(length) for length in np.quantile(length_N, QUANTILES, method="nearest")),
        sequences=len(sequences),
        cut_documents=cut,
        padding=padding,
    )


def samples_of(tokens: TokenFile, tokenizer: Tokenizer, count: int, characters: int) -> Iterator[str]:
    """Yield the first `characters` of `count` documents, spread evenly over the file."""
    first_N, length_N = _documents(tokens)
    for number in np.unique(np.linspace(0, len(first_N) - 1, count).astype(int)):
        first = int(first_N[number])
        text = tokenizer.decode(tokens.plain(first, first + min(int(length_N[number]) - 1, characters)).tolist())
        yield text[:characters]


def _documents(tokens: TokenFile) -> tuple[np.ndarray, np.ndarray]:
    """Return the first token and the size of every document, [N] each."""
    first_N, length_N = (np.concatenate(parts) for parts in zip(*tokens.documents(), strict=True))
    return first_N, length_N
