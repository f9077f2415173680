"""Bytes of an expert: counted from tensors like those of a model, and right to the byte where one can count by hand."""

import json
from pathlib import Path

import pytest
import torch

from moe_dist.benchmarks import precision as precision_table
from moe_dist.benchmarks.precision import PublishedShape, count
from moe_dist.cli import main
from moe_dist.compression import GroupFormat, StorageFormat, init_base, init_residual
from moe_dist.errors import ConfigError
from moe_dist.moe.init_generator import generator

FORM = StorageFormat(GroupFormat(), torch.bfloat16)


@pytest.mark.parametrize("vectors", [True, False])
def test_tensors_have_the_shapes_of_a_model_s(vectors: bool) -> None:
    shape = PublishedShape("small", experts=6, hidden=24, expert_hidden=32, clusters=2, rank=3)
    draw = generator(0, 0, "any", 0)
    base = init_base(24, 32, 0.02, 0.02, draw)
    own = [value for value in vars(init_residual(24, 32, 3, vectors, draw)).values() if value is not None]
    built = list(precision_table._clusters(shape, vectors))
    assert len(built) == 2
    found = [value for value in vars(built[0]).values() if value is not None]
    assert [value.shape for value in found] == [*(b.shape for b in base), *((3, *value.shape) for value in own)]
    row = count(shape, FORM, vectors)
    assert row.standard == 2 * 3 * 24 * 32
    assert row.clustered == 2 * (sum(b.numel() for b in base) / 3 + sum(value.numel() for value in own))


def test_bytes_by_hand() -> None:
    row = count(
        PublishedShape("hand", experts=4, hidden=128, expert_hidden=256, clusters=2, rank=2), FORM, vectors=False
    )
    numbers = 2 * 2 * (128 + 256) + 2 * (256 + 128)
    assert row.own == numbers / 2 + 2 * numbers / 64
    assert row.packed == row.own + 2 * 3 * 128 * 256 / 2


def test_four_bits_are_the_smallest_at_every_published_shape() -> None:
    for shape in precision_table.PUBLISHED:
        row = count(shape, FORM)
        assert row.packed < row.clustered < 0.3 * row.standard
        assert row.own < 0.02 * row.standard


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 experts cannot be divided over 3 clusters"):
        PublishedShape("odd", 8, 64, 64, clusters=3, rank=4)
    with pytest.raises(ConfigError, match="rank 65 must be in 1 to 64"):
        PublishedShape("odd", 8, 64, 128, clusters=2, rank=65)


def test_the_command_shows_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "precision", "precision.group_size=32", "--rank", "16", "--json", str(file)])
    assert ended.value.code == 0
    assert "groups of" in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["stored"]["group_size"] == 32
    assert [row["shape"]["rank"] for row in figures["rows"]] == [16, 16, 16]
    with pytest.raises(SystemExit) as refused:
        main(["bench", "precision", "--clusters", "5"])
    assert refused.value.code == 2
    assert "cannot be divided over 5 clusters" in capsys.readouterr().err
