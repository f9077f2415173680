"""Reading of text files, compressed or not, piece by piece."""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moe_dist.errors import DataError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Compression by suffix, in pyarrow's words."""
_CHUNK = 1 << 20


def is_compressed(path: Path) -> bool:
    """Return True if the file is compressed, by its name."""
    return path.suffix in COMPRESSED


def format_of(path: Path) -> str:
    """Return the suffix that decides the format: the last one, below that of a compression."""
    return Path(path.stem).suffix if is_compressed(path) else path.suffix


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed.

    Raises:
        DataError: it cannot be read, or is not of the compression that its suffix names.
    """
    try:
        if not is_compressed(path):
            with path.open("rb") as file:
                yield file
            return
        import pyarrow  # takes long to import, and most runs need none of it

        with pyarrow.input_stream(str(path), compression=COMPRESSED[path.suffix]) as stream:
            yield io.BufferedReader(stream, _CHUNK)
    except UnicodeDecodeError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read: {reason}") from error


def text_chunks(path: Path) -> Iterator[str]:
    """Yield pieces of a UTF-8 file, with LF line ends (instead of CRLF or CR), without a byte-order mark at its start.

    Raises:
        DataError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        with open_binary(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=None) as text:
            while chunk := text.read(_CHUNK):
                yield chunk
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path: Path) -> DataError:
    """Return the error of a file that is not UTF-8, with the place of its first wrong byte."""
    before, left = 0, b""
    with open_binary(path) as file:
        while chunk := file.read(_CHUNK):
            data = left + chunk
            try:
                data.decode()
                before, left = before + len(data), b""
            except UnicodeDecodeError as error:
                if error.end < len(data) or len(data) - error.start > 3:
                    return _wrong_byte(path, before + error.start, data[error.start])
                before, left = before + error.start, data[error.start :]  # a character that the next piece ends
    return _wrong_byte(path, before, left[0])


def _wrong_byte(path: Path, at: int, byte: int) -> DataError:
    return DataError(f"{path} is not UTF-8 text: byte {at} is 0x{byte:02x}")
