"""Sources of a blend in the report and in the closing table."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_dist.metrics import render_summary
from moe_dist.report.read import RunFiles
from moe_dist.report.tables import sources
from tests.unit.metrics.example import summary

WEB = {"tokens": 12000, "epochs": 0.25, "validation_loss": 2.5, "padding": 0.015, "cut_documents": 0.2}
CODE = {"tokens": 4000, "epochs": 3.0, "validation_loss": 1.25}


def run_of(found: Any) -> RunFiles:
    return RunFiles("run", Path("run"), summary={"data": {"sources": found}})


def test_each_source_is_a_row_of_the_report() -> None:
    html = sources(run_of({"web": WEB, "code": CODE}))
    for cell in ("web", "12,000", "0.25", "2.5000", "1.50%", "20.0%", "code", "1.2500", "3.00"):
        assert f"<td>{cell}</td>" in html


@pytest.mark.parametrize("found", [None, {"corpus": WEB}, [1, 2], {"a": 1, "b": "x"}])
def test_other_runs_have_no_table_and_damaged_ones_no_error(found: Any) -> None:
    assert sources(run_of(found)).count("<tr>") in (0, 3)


def test_the_closing_table_tells_loss_and_packing() -> None:
    console = Console(record=True, width=160)
    plain = {"corpus": {"tokens": 1, "epochs": 1.0, "validation_loss": None}}
    render_summary({**summary(), "data": {"sources": {"web": WEB, "code": CODE} | plain}}, console)
    text = console.export_text()
    assert "validation loss 2.5000; 12,000 tokens, 0.25 epochs; padding 1.50%, 20.0% of documents cut" in text
    assert "validation loss 1.2500; 4,000 tokens, 3.00 epochs" in text
    assert "text corpus" not in text
