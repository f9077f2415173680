"""Data sets of the Hugging Face hub, local folders of the same format, and cached downloads without a network.

The `datasets` library is imported inside functions: it takes more than a second, and most runs do without it.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_dist.data.documents import normalize_lines, split_rows
from moe_dist.data.files import digest_of
from moe_dist.data.table_files import checked_text, no_column
from moe_dist.errors import DataError

_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class HubSource:
    """Split of a data set; a row is a document, WikiText's lines are joined to articles."""

    name: str
    """Name on the hub, or a local folder."""
    subset: str | None
    split: str
    text_column: str
    split_key: str = "corpus.split"
    key: str = "corpus."
    """Prefix of the other keys in messages."""
    instead: str = "corpus.kind=text with local files in corpus.paths"
    streaming: bool = False
    """True: rows are read from where the data set is, at each pass; False: it is downloaded whole at first."""

    def __str__(self) -> str:
        return f"{self.split_key}={self.split} of {self.name}"

    def fingerprint(self) -> str:
        """Return a text that changes with the data set's version, split and column."""
        version = self._version() if self.streaming else self.table._fingerprint
        return f"{self.name} {self.subset} {self.split} {self.text_column} {version}"

    def texts(self) -> Iterator[str]:
        """Yield the texts of all documents; rows whose text is null are skipped.

        Raises:
            DataError: the data set cannot be loaded, or has no such split or column.
        """
        return split_rows(map(normalize_lines, self._rows()))

    def _rows(self) -> Iterator[str]:
        origin, column = f"data set {self.name}", self.text_column
        names = self._columns()
        if column not in names:
            raise no_column(origin, column, names)
        rows = enumerate(self.table.select_columns([column]))  # others may need libraries to decode
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of a stream, as of its loading
                raise DataError(self._advice(error, True)) from error
            if row[column] is not None:
                yield checked_text(row[column], f"{origin}: row {number}", column, names)

    def _columns(self) -> list[str]:
        """Return the names of the columns; a stream without a schema shows them in its first row."""
        names: list[str] | None = self.table.column_names
        return list(next(iter(self.table), {})) if names is None else names

    def _version(self) -> str:
        """Return the commit of a data set on the hub, or a digest of a local folder's files.

        Raises:
            DataError: the hub does not tell.
        """
        if os.path.exists(self.name):
            return digest_of(sorted(path for path in Path(self.name).rglob("*") if path.is_file()), Path(self.name))
        import huggingface_hub

        try:
            return str(huggingface_hub.HfApi().dataset_info(self.name, timeout=_PROBE_SECONDS).sha)
        except Exception as error:  # whatever the HTTP library of the day raises
            raise DataError(
                f"{self.key}name={self.name}: {self.key}streaming=true needs the Hugging Face hub, which does not "
                f"answer for it: {_cause(error)}"
            ) from error

    @cached_property
    def table(self) -> Any:
        """Rows of the split.

        Raises:
            DataError: they cannot be loaded.
        """
        from datasets import load_dataset

        local = os.path.exists(self.name)
        reachable = local or hub_reachable()
        try:
            with nullcontext() if reachable and not local else offline(), quiet():
                return load_dataset(self.name, self.subset, split=self.split, streaming=self.streaming)
        except Exception as error:  # data sets fail with whatever their readers and loading scripts raise
            raise DataError(self._advice(error, reachable)) from error

    def _advice(self, error: Exception, reachable: bool) -> str:
        from datasets.exceptions import DatasetNotFoundError

        named = f"{self.key}name={self.name} ({self.key}subset={self.subset}, {self.split_key}={self.split})"
        if not reachable and isinstance(error, (ConnectionError, DatasetNotFoundError)):
            return (
                f"{named} is not in this machine's cache and the Hugging Face hub cannot be reached: run once "
                f"where there is a network and share that cache (HF_HOME), or use {self.instead}"
            )
        hint = "; null holds out a fraction instead" if self.split_key == "corpus.validation_split" else ""
        return f"{named} cannot be loaded: {_cause(error)}{hint}"


def _cause(error: BaseException) -> str:
    """Return the first line of the error that caused the others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def hub_reachable() -> bool:
    """Return True if the hub answers one request within seconds.

    `load_dataset` itself repeats each request six times, 24 s in total, before it uses its cache. The request runs in a
    thread, because a name server that does not answer blocks it for longer than its timeout.
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
    """Disable network access of `datasets`, like HF_HUB_OFFLINE=1 set before its import."""
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
    """Silence the log of `datasets`, whose errors are raised as well."""
    from datasets.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
