"""Injects OSError into the file operations of a run: the n-th one at a place in the code, or all from there on."""

import builtins
import errno
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import moe_dist
from moe_dist.checkpoint import storage

PACKAGE = str(Path(moe_dist.__file__).parent)
BY_PATH = (
    "open", "replace", "rename", "mkdir", "unlink", "rmdir", "scandir", "listdir", "stat", "chmod", "truncate",
)  # fmt: skip
BY_DESCRIPTOR = ("write", "pwrite", "fsync", "ftruncate", "posix_fallocate")
READS = {"stat", "scandir", "listdir", "read"}


@dataclass(frozen=True)
class Place:
    """One kind of operation, at one place in the code, on one kind of file."""

    operation: str
    where: str
    file: str


@dataclass(frozen=True)
class Fault:
    """Error `number` of the n-th operation at `place`, and of all later writes below `runs` if `lasting`."""

    place: Place
    nth: int
    number: int
    lasting: bool = False


@dataclass
class FileFaults:
    """Context manager that counts the operations on files below `folder`, and lets one of them fail."""

    folder: Path
    fault: Fault | None = None
    counts: Counter[Place] = field(default_factory=Counter)
    happened: bool = False

    def __enter__(self) -> Self:
        self._paths: dict[int, str] = {}
        self._before: list[tuple[Any, str, Any]] = []
        for name in BY_PATH:
            self._patch(os, name, self._by_path(name, getattr(os, name)))
        for name in BY_DESCRIPTOR:
            self._patch(os, name, self._by_descriptor(name, getattr(os, name)))
        opened = self._open(io.open)
        self._patch(io, "open", opened)
        self._patch(builtins, "open", opened)
        self._patch(storage, "save_file", self._save_file)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)

    def check(self, operation: str, path: Any) -> None:
        """Count an operation, and raise if it is to fail."""
        try:
            text = os.path.abspath(os.fsdecode(path))
        except TypeError:
            return
        if not text.startswith(str(self.folder)):
            return
        place = Place(operation, _where(), _kind(os.path.relpath(text, self.folder)))
        self.counts[place] += 1
        fault = self.fault
        if fault is None:
            return
        due = place == fault.place and self.counts[place] == fault.nth
        later = fault.lasting and self.happened and operation not in READS and f"{os.sep}runs" in text
        if due or later:
            self.happened = True
            named = operation not in ("write", "pwrite", "read", "fsync", "ftruncate", "save_file")  # as in reality
            raise OSError(fault.number, os.strerror(fault.number), *([text] if named else []))

    def _save_file(self, tensors: dict[str, Tensor], path: Path) -> None:
        try:
            self.check("save_file", path)
        except OSError as error:
            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror}") from None
        save_file(tensors, path)

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _by_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Any = ".", *args: Any, **options: Any) -> Any:
            folder = options.get("dir_fd") or options.get("src_dir_fd")
            inside = self._paths.get(path) if isinstance(path, int) else path
            if folder is not None and inside is not None:
                inside = os.path.join(self._paths.get(folder, ""), inside)
            self.check(name, inside)
            result = real(path, *args, **options)
            if name == "open" and inside is not None:
                self._paths[result] = os.fsdecode(inside)
            return result

        return operation

    def _by_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(descriptor: int, *args: Any) -> Any:
            self.check(name, self._paths.get(descriptor))
            return real(descriptor, *args)

        return operation

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, *args: Any, **options: Any) -> Any:
            if isinstance(file, int):
                return real(file, *args, **options)
            self.check("open", file)
            result = real(file, *args, **options)
            inside = os.path.abspath(os.fsdecode(file)).startswith(str(self.folder))
            return _File(result, file, self) if inside else result

        return opened


class _File:
    """Open file whose writes, reads and flushes may fail."""

    def __init__(self, file: Any, path: Any, faults: FileFaults) -> None:
        self.__dict__.update(_file=file, _path=path, _faults=faults)

    def __getattr__(self, name: str) -> Any:
        if name in ("write", "writelines", "truncate"):
            self._faults.check("write", self._path)
        if name in ("read", "readline", "readlines", "readinto"):
            self._faults.check("read", self._path)
        return getattr(self._file, name)

    def flush(self) -> None:
        self._faults.check("write", self._path)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def _where() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "library"
    return f"{frame.f_code.co_filename.removeprefix(PACKAGE + os.sep)}:{frame.f_code.co_name}"


def _kind(path: str) -> str:
    """Return the path without numbers and hashes."""
    path = re.sub(r"checkpoints/(\.?)step-|smoke/(\.?)final", r"CHECKPOINT", path.replace(os.uname().nodename, "HOST"))
    return re.sub(r"CHECKPOINTN?", "CHECKPOINT", re.sub(r"[0-9a-f]{8,}|\d+", "N", path))


NUMBERS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ENOENT)
