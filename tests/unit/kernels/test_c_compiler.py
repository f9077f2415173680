"""Compiling on demand: cached, private, safe for many ranks, and never a reason to stop."""

import ctypes
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moe_dist.kernels import c_compiler as native
from moe_dist.kernels import lowrank_swiglu_cpu as hidden_compiled
from moe_dist.kernels.kernel_selftest import kernel_selftest

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return ANSWER; }\n")
    return path


def answer(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.answer())


def compiled_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "moe-dist" / "native").glob("*.so"))


@needs_compiler
def test_one_library_for_each_set_of_defines(source: Path, tmp_path: Path) -> None:
    assert answer(native.library(source, ("ANSWER=3",))) == 3
    assert answer(native.library(source, ("ANSWER=4",))) == 4
    assert len(compiled_files(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "cache" / "moe-dist" / "native").stat().st_mode & 0o077 == 0


@needs_compiler
def test_a_changed_source_is_compiled_anew(source: Path) -> None:
    assert answer(native.library(source, ("ANSWER=3",))) == 3
    source.write_text("int answer(void) { return ANSWER + 1; }\n")
    native.library.cache_clear()
    assert answer(native.library(source, ("ANSWER=3",))) == 4


@needs_compiler
def test_many_at_once_compile_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[list[str]] = []
    compile_one = native._compile

    def counted(command: list[str], target: Path) -> None:
        compilations.append(command)
        compile_one(command, target)

    monkeypatch.setattr(native, "_compile", counted)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: native._compiled(source, ("ANSWER=5",)), range(8)))
    assert len(compilations) == 1
    assert set(paths) == set(compiled_files(tmp_path))


@needs_compiler
def test_broken_source_warns_and_gives_none(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text("this is not C\n")
    with caplog.at_level(logging.WARNING):
        assert native.library(source, ()) is None
    assert "answer.c is not compiled, torch is used instead" in caplog.text
    assert not compiled_files(tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_no_compiler_gives_none(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.library(source, ()) is None


@needs_compiler
def test_a_cache_that_others_can_write_is_not_used(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "moe-dist" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert native.library(source, ("ANSWER=3",)) is None


def test_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.enabled()
    monkeypatch.setenv("MOE_DIST_NATIVE", "0")
    assert not native.enabled()


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets of x86")
@pytest.mark.parametrize("isa", ["avx2", "sse4", "scalar"])
def test_kernels_of_older_processors_agree_with_the_masked_one(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_DIST_ISA", isa)
    hidden_compiled._library.cache_clear()
    try:
        for dtype, rank in ((torch.float32, 4), (torch.bfloat16, 3)):
            assert hidden_compiled.available(torch.device("cpu"), dtype, rank, 48)
            assert kernel_selftest(hidden_compiled.lowrank_swiglu_cpu, torch.device("cpu"), dtype, rank) is None
    finally:
        hidden_compiled._library.cache_clear()


def test_an_unknown_instruction_set_is_named(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOE_DIST_ISA", "avx3")
    with caplog.at_level(logging.WARNING):
        assert native.library(source, ()) is None
    assert "MOE_DIST_ISA=avx3 is not one of native, avx2, sse4, scalar" in caplog.text


def test_a_compiler_that_takes_too_long_is_told_in_words(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def late(*_: object) -> Path:
        raise subprocess.TimeoutExpired(["cc"], 120, stderr=b"many warnings")

    monkeypatch.setattr(native, "_compiled", late)
    with caplog.at_level(logging.WARNING):
        assert native.library(source, ()) is None
    assert "many warnings" in caplog.text
    assert "b'" not in caplog.text
