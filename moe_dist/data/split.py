"""Split of a stream of documents into training and validation, decided by their digests alone.

A first pass surveys the documents, which takes 16 bytes for each; later passes read them again, in the same order.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_dist.data.documents import Document, limit_bytes
from moe_dist.data.near_duplicates import near_duplicates
from moe_dist.errors import DataError

TRAIN, VALIDATION = "train", "validation"

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Survey:
    """Keys [n] and sizes in bytes [n] of a source's documents, in order."""

    keys: Keys
    sizes: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Survey":
        """Read all documents once."""
        keys, sizes = array("Q"), array("Q")
        for document in documents:
            keys.append(document.key)
            sizes.append(len(document.text.encode()))
        return cls(np.frombuffer(keys, np.uint64), np.frombuffer(sizes, np.uint64))


@dataclass(frozen=True)
class Split:
    """Training and validation documents of a corpus; no digest is on both sides.

    Attributes:
        read: reads the training source.
        read_validation: reads the validation source; None: part of the training source is held out.
        survey: of the training source.
        held_out: sorted keys of the documents of the training source that are not trained on.
        dropped: sorted keys of others that are not trained on and not held out.
    """

    read: Callable[[], Iterator[Document]]
    read_validation: Callable[[], Iterator[Document]] | None
    survey: Survey
    held_out: Keys
    dropped: Keys = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def size(self) -> int:
        """Size of the training source, bytes."""
        return int(self.survey.sizes.sum())

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Yield all documents with their side, TRAIN or VALIDATION."""
        for document in self.read():
            if not _is_in(self.held_out, document):
                if not _is_in(self.dropped, document):
                    yield TRAIN, document
            elif self.read_validation is None:
                yield VALIDATION, document
        for document in self.read_validation() if self.read_validation else ():
            yield VALIDATION, document

    def side(self, name: str) -> Iterator[Document]:
        """Yield the documents of one side."""
        return (document for side, document in self.documents() if side == name)

    def sample(self, max_bytes: int) -> Iterator[Document]:
        """Yield training documents up to `max_bytes` in the order of their digests, which is unbiased."""
        trained = ~np.isin(self.survey.keys, np.concatenate([self.held_out, self.dropped]))
        keys, sizes = self.survey.keys[trained], self.survey.sizes[trained]
        order = np.argsort(keys, kind="stable")
        whole = int(np.searchsorted(np.cumsum(sizes[order]), max_bytes))  # documents before the one that is cut
        last = int(keys[order[min(whole, len(order) - 1)]])
        chosen = [document for document in self.side(TRAIN) if document.key <= last]
        return limit_bytes(sorted(chosen, key=lambda document: document.digest), max_bytes)

    def near_duplicates(self) -> Keys:
        """Return the sorted keys of training documents that are nearly equal to a held-out one."""
        held = (document.text.split() for document in self.side(VALIDATION))
        found = near_duplicates(held, lambda: ((one.key, one.text.split()) for one in self.side(TRAIN)))
        return np.array(sorted(found), np.uint64)


def _is_in(keys: Keys, document: Document) -> bool:
    at = int(np.searchsorted(keys, np.uint64(document.key)))
    return at < len(keys) and int(keys[at]) == document.key


def lowest_keys(keys: Keys, fraction: float) -> Keys:
    """Return about `fraction` of the distinct keys (at least one, not all): the lowest, sorted.

    The choice depends on content alone, not on order or file names; duplicates share a key and so stay together.

    Raises:
        DataError: there are fewer than two distinct documents.
    """
    distinct = np.unique(keys)
    if len(distinct) < 2:
        raise DataError(
            f"the corpus is {len(distinct)} distinct document(s), of which none can be held out: give more text, or "
            "corpus.validation_paths (text) or corpus.validation_split (hub)"
        )
    return distinct[: min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)]
