"""docs/metrics.md is generated from the definitions, which cover every figure of the contract and of real runs."""

from pathlib import Path

import pytest

from moe_dist.metrics import REQUIRED_KEYS, LoadStatistics
from moe_dist.metrics.reference import filled, keys_of, undefined
from moe_dist.metrics.summary_definitions import SUMMARY
from tests.unit.metrics.example import summary

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
DEFINED = {key for cell in SUMMARY for key in keys_of(cell)}


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text) == text, "run: python -m moe_dist.metrics.reference docs/metrics.md"
    assert "validation.loss" in filled(text.replace("`validation.loss`", "changed by hand"))


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_every_required_key_is_defined(key: str) -> None:
    assert key in DEFINED


def test_every_figure_of_balance_is_defined() -> None:
    assert {f"load.{name}" for name in LoadStatistics.__dataclass_fields__} <= DEFINED


def test_what_is_not_defined_is_found() -> None:
    assert undefined("summary.json", summary()) == []
    unknown = {"collectives": {"tensor": {"bytes_per_step": 1}}, "loss_scale": None, "load": {"nonsense": 1}, "new": 2}
    assert undefined("summary.json", unknown) == ["load.nonsense", "new"]
    assert list(keys_of("`data.sources.NAME.tokens`, `.epochs`")) == [
        "data.sources.NAME.tokens",
        "data.sources.NAME.epochs",
    ]
