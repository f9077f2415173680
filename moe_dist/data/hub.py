"""Data sets of the Hugging Face hub; without a network, those that were downloaded before.

The `datasets` library is imported inside functions: it takes more than a second, and most runs do without it.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moe_dist.data.documents import split_rows
from moe_dist.errors import DataError

_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class HubSource:
    """One split of a data set on the hub; a row is a document, WikiText's lines are joined to articles."""

    name: str
    subset: str | None
    split: str
    text_column: str
    split_key: str = "corpus.split"
    key: str = "corpus."
    """Before the names of the other keys, where a message tells them."""
    instead: str = "corpus.kind=text with local files in corpus.paths"

    def __str__(self) -> str:
        return f"{self.split_key}={self.split} of {self.name}"

    def fingerprint(self) -> str:
        """Changes with the data set's version, split and column."""
        return f"{self.name} {self.subset} {self.split} {self.text_column} {self.table._fingerprint}"

    def texts(self) -> Iterator[str]:
        """Texts of all documents.

        Raises:
            DataError: the data set cannot be had, or has no such split or column.
        """
        return split_rows(rows_of(self.table, self.text_column, f"data set {self.name}"))

    @cached_property
    def table(self) -> Any:
        """The rows.

        Raises:
            DataError: they cannot be had.
        """
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        reachable = hub_reachable()
        try:
            with nullcontext() if reachable else offline():
                return load_dataset(self.name, self.subset, split=self.split)
        except (OSError, ValueError, DatasetsError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(self._advice(reason, reachable)) from error

    def _advice(self, reason: str, reachable: bool) -> str:
        named = f"{self.key}name={self.name} ({self.key}subset={self.subset}, {self.split_key}={self.split})"
        if reachable:
            hint = "; null holds out a fraction instead" if self.split_key == "corpus.validation_split" else ""
            return f"{named} cannot be loaded: {reason}{hint}"
        return (
            f"{named} is not in this machine's cache and the Hugging Face hub cannot be reached: run once "
            f"where there is a network and share that cache (HF_HOME), or use {self.instead}"
        )


def rows_of(table: Iterable[Mapping[str, Any]], column: str, origin: str) -> Iterator[str]:
    """The text column of each row; rows where it is null are left out.

    Raises:
        DataError: the column is missing, or holds something other than text.
    """
    for number, row in enumerate(table):
        if column not in row:
            raise DataError(f"{origin} has no column corpus.text_column={column}; it has: {', '.join(row)}")
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(
                f"{origin}: row {number} of corpus.text_column={column} is {type(text).__name__}, not text; other "
                f"columns: {', '.join(name for name in row if name != column) or 'none'}"
            )
        yield text


def hub_reachable() -> bool:
    """Whether the hub answers one request within seconds.

    `load_dataset` itself repeats each request six times, 24 s in all, before it looks into its cache. A thread, because
    a name server that does not answer holds a request for longer than the request's own timeout.
    """
    import huggingface_hub

    answers: list[int] = []

    def probe() -> None:
        try:
            endpoint = huggingface_hub.constants.ENDPOINT
            answers.append(huggingface_hub.get_session().head(endpoint, timeout=_PROBE_SECONDS).status_code)
        except Exception:  # whatever the HTTP library of the day raises, there was no answer
            return

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(answers)


@contextmanager
def offline() -> Iterator[None]:
    """Keeps `datasets` from the network, as HF_HUB_OFFLINE=1 would had it been set before the import."""
    import datasets
    import huggingface_hub

    switches: tuple[Any, Any] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps `datasets` from logging errors that are raised as well, and then told in our one line."""
    from datasets.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
