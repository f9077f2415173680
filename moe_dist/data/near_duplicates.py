"""Near-duplicates of held-out documents among training documents, by MinHash and locality-sensitive hashing.

Two documents are near-duplicates if their sets of runs of `RUN` words have a Jaccard similarity of about `THRESHOLD`.
Memory holds `BATCH` held-out documents at a time, each of which takes one pass over the training documents.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import xxhash

from moe_dist.errors import DataError

THRESHOLD = 0.8
RUN = 5
PERMUTATIONS = 128
BATCH = 50_000

Words = Sequence[str]


def near_duplicates(held_out: Iterable[Words], train: Callable[[], Iterator[tuple[int, Words]]]) -> Iterator[int]:
    """Yield the numbers of training documents that are near-duplicates of a held-out one.

    Args:
        held_out: words of the held-out documents.
        train: reads the training documents, each with a number.

    Raises:
        DataError: datasketch is not installed.
    """
    held_out, found = iter(held_out), set[int]()
    while batch := [_signature(words) for words in islice(held_out, BATCH)]:
        index = _index_of(batch)
        for number, words in train():
            if number in found:
                continue
            signature = _signature(words)
            if any(batch[at].jaccard(signature) >= THRESHOLD for at in index.query(signature)):
                found.add(number)
                yield number


def _index_of(signatures: Sequence[Any]) -> Any:
    index = _datasketch().MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    for number, signature in enumerate(signatures):
        index.insert(number, signature)
    return index


def _signature(words: Words) -> Any:
    """Return the MinHash of a document's runs of words; one with fewer words is a single run."""
    runs = {" ".join(words[first : first + RUN]).encode() for first in range(max(1, len(words) - RUN + 1))}
    signature = _datasketch().MinHash(num_perm=PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
    signature.update_batch(runs)
    return signature


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise DataError("near-duplicates need the package datasketch: pip install 'moe-dist[dedup]'") from error
    return datasketch
