"""`train.precision: auto` follows the processor."""

from pathlib import Path

import pytest

from moe_dist.config import load_config, machine

X86 = "processor\t: 0\nmodel name\t: Some CPU bf16\nflags\t\t: fpu avx2 avx512f {} sha_ni\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {} sve\n"


@pytest.mark.parametrize(
    ("info", "gpu", "isa", "wanted"),
    [
        (X86.format("avx512_bf16"), False, "native", "bfloat16"),
        (X86.format("amx_bf16"), False, "native", "bfloat16"),
        (X86.format(""), False, "native", "float32"),  # the model's name is no flag
        (ARM.format("bf16"), False, "native", "bfloat16"),
        (ARM.format("i8mm"), False, "native", "float32"),
        (X86.format("avx512_bf16"), False, "avx2", "float32"),
        (X86.format(""), True, "native", "bfloat16"),
        (None, False, "native", "float32"),
    ],
)
def test_auto_takes_bfloat16_where_there_are_instructions(
    info: str | None, gpu: bool, isa: str, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if info is not None:
        (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    monkeypatch.setenv("MOE_DIST_ISA", isa)
    assert load_config(None, ["train.precision=auto"]).train.precision == wanted
    assert load_config(None, []).train.precision in ("float32", "bfloat16")  # the default is resolved, too
    assert load_config(None, ["train.precision=bfloat16"]).train.precision == "bfloat16"
