"""Text on this machine: the Python standard library's source, and files the user names."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.data.documents import split_rows, split_text
from moe_dist.data.hub import offline, quiet, rows_of
from moe_dist.errors import DataError

PLAIN = (".txt", ".tokens", ".raw")  # the last two are WikiText's own
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")

# Left out: what is not the library (site-packages), what this machine's build wrote (config-*, _sysconfigdata*), tests
# (more bytes than the library), and encodings, whose near-identical tables would put copies on both sides of the split.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_BUILD_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class StdlibSource:
    """The Python standard library's own modules in the order of their names; a module is a document."""

    root: Path

    def fingerprint(self) -> str:
        """Changes with the name or content of any module."""
        return _digest_of(self._modules(), names=self.root)

    def texts(self) -> Iterator[str]:
        """Every module that is UTF-8 (a few old ones are not, and are left out)."""
        for path in self._modules():
            try:
                yield path.read_bytes().decode()
            except UnicodeDecodeError:
                continue

    def _modules(self) -> list[Path]:
        found = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [n for n in subfolders if n not in _SKIPPED_FOLDERS and not n.startswith(_BUILD_PREFIXES)]
            found += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith(_BUILD_PREFIXES)]
        if not found:
            raise DataError(
                f"corpus.kind=stdlib found no Python source in {self.root}: this Python was installed without it; use "
                "corpus.kind=text with corpus.paths"
            )
        return sorted(found, key=lambda path: path.relative_to(self.root).as_posix())


def stdlib_source() -> StdlibSource:
    """The standard library of the running Python."""
    return StdlibSource(Path(sysconfig.get_path("stdlib")))


@dataclass(frozen=True)
class FileSource:
    """Files in the order of their names: plain text is cut into documents (`split_text`), tables give one a row."""

    files: tuple[Path, ...]
    text_column: str

    def __str__(self) -> str:
        return str(self.files[0]) + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    def fingerprint(self) -> str:
        """Changes with the content or format of any file, and with the column read."""
        return f"{self.text_column} {_digest_of(self.files)}"

    def texts(self) -> Iterator[str]:
        """Texts of all documents.

        Raises:
            DataError: a file is not UTF-8, not a table, or lacks the column.
        """
        for path in self.files:
            if path.suffix in PLAIN:
                yield from split_text(_read_utf8(path))
            else:
                yield from split_rows(self._rows(path))

    def _rows(self, path: Path) -> Iterator[str]:
        # datasets takes more than a second to import, and most runs do without it
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        if not path.stat().st_size:
            return  # datasets fails on an empty .jsonl
        builder = "json" if path.suffix == ".jsonl" else "parquet"
        try:
            with offline(), quiet():
                table = load_dataset(builder, data_files=[glob.escape(str(path))], split="train", streaming=True)
                yield from rows_of(table, self.text_column, str(path))
        except (OSError, ValueError, TypeError, StopIteration, DatasetsError) as error:
            raise DataError(f"{path} cannot be read as {path.suffix}: {_first_line(error)}") from error


def match_files(key: str, patterns: Sequence[str]) -> tuple[Path, ...]:
    """Files that the paths or globs (`**` and `~` allowed) name, each once, sorted.

    Raises:
        DataError: a pattern matches no file, or a file is of a format not read here.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = {Path(name).resolve() for name in glob.glob(os.path.expanduser(pattern), recursive=True)}
        files = {path for path in matches if path.is_file()}
        if not files:
            raise DataError(f"{key}: {pattern!r} matches no file (relative to {Path.cwd()})")
        found |= files
    for path in sorted(found):
        if path.suffix not in SUFFIXES:
            raise DataError(f"{key}: {path} is not one of the formats read: {' '.join(SUFFIXES)}")
    return tuple(sorted(found))


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _digest_of(files: Sequence[Path], names: Path | None = None) -> str:
    """SHA-256 over the files' contents, and over their names below `names` or else their suffixes."""
    total = hashlib.sha256()
    for path in files:
        name = path.relative_to(names).as_posix() if names else path.suffix
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        total.update(f"{name}\n{content}\n".encode())
    return total.hexdigest()


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
