"""Local text: the Python standard library's source, and files that the user names."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.text_formats import COMPRESSIBLE, ENDINGS, PLAIN, SUFFIXES
from moe_dist.data.compressed import format_of, is_compressed, text_chunks
from moe_dist.data.documents import normalize_lines, split_rows, split_stream
from moe_dist.data.table_files import jsonl_texts, parquet_texts
from moe_dist.errors import DataError

# Skipped: packages of others (site-packages), files of this machine's build (config-*, _sysconfigdata*), tests (more
# bytes than the library), and encodings, whose near-identical tables would put copies on both sides of the split.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_BUILD_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class StdlibSource:
    """Modules of the Python standard library, sorted by name; a module is a document."""

    root: Path

    def fingerprint(self) -> str:
        """Return a digest of the names and contents of all modules."""
        return digest_of(self._modules(), names=self.root)

    def texts(self) -> Iterator[str]:
        """Yield every module that is UTF-8; a few old ones are not."""
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
    """Return the source of the running Python's standard library."""
    return StdlibSource(Path(sysconfig.get_path("stdlib")))


@dataclass(frozen=True)
class FileSource:
    """Files sorted by name: plain text is split into documents (`split_stream`), a table has one per row.

    Line ends (CRLF, CR) become LF and a byte-order mark is dropped before texts are split. The suffix of the path that
    the user named decides the format, also of a symbolic link. Of a table only the text column is read.
    """

    files: tuple[Path, ...]
    text_column: str

    def __str__(self) -> str:
        return first_and_more(self.files)

    def fingerprint(self) -> str:
        """Return a digest of the content and format of all files, and the column."""
        return f"{self.text_column} {digest_of(self.files)}"

    def texts(self) -> Iterator[str]:
        """Yield the texts of all documents.

        Raises:
            DataError: a file is not UTF-8, not a table, or lacks the column.
        """
        for path in self.files:
            kind = format_of(path)
            if kind in PLAIN:
                yield from split_stream(text_chunks(path))
            else:
                read = jsonl_texts if kind == ".jsonl" else parquet_texts
                yield from split_rows(map(normalize_lines, read(path, self.text_column)))


def match_files(key: str, patterns: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> tuple[Path, ...]:
    """Return the files that paths or globs (`**` and `~` allowed) name, each once, sorted by name.

    A path that exists is taken literally, even if it has a glob's characters.

    Raises:
        DataError: a pattern matches no file, or the format of a file is not supported.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        files = _files_of(key, os.path.expanduser(pattern))
        if not files:
            raise DataError(f"{key}: {pattern!r} matches no file (relative to {Path.cwd()})")
        for name in sorted(map(os.path.abspath, files)):
            found.setdefault(os.path.realpath(name), Path(name))
    for path in sorted(found.values()):
        if format_of(path) not in suffixes or (is_compressed(path) and format_of(path) not in COMPRESSIBLE):
            formats = ENDINGS if suffixes is SUFFIXES else suffixes
            raise DataError(f"{key}: {path} has none of the supported formats: {' '.join(formats)}")
    return tuple(sorted(found.values()))


def _files_of(key: str, pattern: str) -> list[str]:
    if not os.path.lexists(pattern):
        return [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if os.path.isdir(pattern):
        raise DataError(f"{key}: {pattern!r} is a folder: name its files, such as {os.path.join(pattern, '*.txt')}")
    if not os.path.exists(pattern):
        raise DataError(
            f"{key}: {pattern!r} is a link to {os.readlink(pattern)!r}, which does not exist: fetch the data"
        )
    return [pattern]


def first_and_more(paths: Sequence[Path]) -> str:
    """Return a description of files: the first one, and the number of others."""
    return str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def digest_of(files: Sequence[Path], names: Path | None = None) -> str:
    """Return a SHA-256 over the files' contents, and over their names below `names` or else their suffixes."""
    total = hashlib.sha256()
    for path in files:
        name = path.relative_to(names).as_posix() if names else "".join(path.suffixes[-1 - is_compressed(path) :])
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        total.update(f"{name}\n{content}\n".encode())
    return total.hexdigest()
