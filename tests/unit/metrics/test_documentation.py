"""docs/metrics.md defines every figure of the contract."""

import re
from pathlib import Path

import pytest

from moe_dist.metrics import REQUIRED_KEYS, LoadStatistics

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
SUMMARY = TEXT.partition("## summary.json")[2].partition("\n## ")[0]
DEFINED = {key for row in re.findall(r"^\| (`.*?) \|", SUMMARY, re.MULTILINE) for key in re.findall(r"`(.+?)`", row)}


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_every_required_key_is_defined(key: str) -> None:
    assert key in DEFINED


def test_every_figure_of_balance_is_defined() -> None:
    assert {f"load.{name}" for name in LoadStatistics.__dataclass_fields__} <= DEFINED
