"""Results as Markdown, CSV and JSON."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.metrics import installed_versions
from moe_dist.studies.reproduction.claims import CLAIMS, verdicts
from moe_dist.studies.reproduction.figures import NAMES, KindRow, Result

COLUMNS = {  # figure -> heading, format, factor
    "loss": ("validation loss", ".4f", 1.0),
    "token_perplexity": ("token perplexity", ".2f", 1.0),
    "word_perplexity": ("word perplexity", ".1f", 1.0),
    "glue": ("GLUE", ".1f", 1.0),
    "parameters": ("parameters, M", ".2f", 1e-6),
    "expert_share": ("expert parameters", ".1%", 1.0),
    "active_work": ("expert MFLOP per token and layer", ".3f", 1e-6),
    "bytes_per_token_layer": ("B per token and layer", ".0f", 1.0),
    "load_variance": ("load variance", ".1e", 1.0),
    "load_cv2": ("cv2 of loads", ".3f", 1.0),
    "tokens_per_second": ("tokens/s", ",.0f", 1.0),
    "training_bytes": ("training memory, MiB", ",.1f", 2**-20),
    "peak_rss_bytes": ("peak RSS, MiB", ",.0f", 2**-20),
}
Rates = Mapping[str, Mapping[str, float]]
"""Validation loss of the grid: family -> learning rate -> loss."""


def markdown(table: Sequence[KindRow], claimed: Sequence[str], grid: Rates, facts: Sequence[str]) -> str:
    """Return the whole report as Markdown.

    Args:
        claimed: kinds for which the paper's claims are checked.
        facts: lines on the conditions of the measurement.
    """
    parts = [
        "# Results of a reproduction",
        "",
        *facts,
        "",
        "Mean ± standard deviation over seeds. Runs come one after another, so tokens/s compare only if the machine",
        "did nothing else all the while; `moe-dist bench step` takes kinds in turns.",
        "",
        *_figures(table),
    ]
    for kind in claimed:
        parts += ["", *_claims(table, kind)]
    if grid:
        parts += ["", *_grid(grid)]
    problems = [f"- {row.kind}: {problem}" for row in table for problem in row.problems]
    if problems:
        parts += ["", "## Missing parts", "", *problems]
    return "\n".join(parts) + "\n"


def _figures(table: Sequence[KindRow]) -> list[str]:
    shown = {name: column for name, column in COLUMNS.items() if any(row.values.get(name) for row in table)}
    lines = _head(["kind", *(heading for heading, _, _ in shown.values()), "seeds"])
    for row in table:
        cells = [_cell(row, name, form, factor) for name, (_, form, factor) in shown.items()]
        lines.append(_line([row.kind, *cells, str(len(row.values.get("loss", {})))]))
    return lines


def _cell(row: KindRow, name: str, form: str, factor: float) -> str:
    middle, spread = row.middle(name), row.spread(name)
    if middle is None:
        return "-"
    return f"{middle * factor:{form}}" + (f" ± {spread * factor:{form}}" if spread else "")


def _claims(table: Sequence[KindRow], kind: str) -> list[str]:
    found = verdicts(table, kind)
    lines = [f"## The paper's claims: {kind}", ""]
    if not found:
        return [*lines, "Nothing was measured."]
    lines += ["Seed by seed: mean (smallest to largest).", "", *_head(["claim", "against", "measured"])]
    lines += [_line([verdict.claim.text, verdict.baseline, str(verdict)]) for verdict in found]
    unmeasured = [claim.text for claim in CLAIMS if claim not in [verdict.claim for verdict in found]]
    return [*lines, *(["", f"Not measured: {'; '.join(unmeasured)}."] if unmeasured else [])]


def _grid(grid: Rates) -> list[str]:
    rates = sorted({rate for losses in grid.values() for rate in losses}, key=float)
    lines = ["## Learning rates", "", "Validation loss of short runs; the best rate of each is taken.", ""]
    lines += _head(["kind", *rates])
    for family, losses in grid.items():
        best = min(losses, key=lambda rate: losses[rate])
        cells = [f"**{losses[r]:.4f}**" if r == best else f"{losses[r]:.4f}" if r in losses else "-" for r in rates]
        lines.append(_line([family, *cells]))
    return lines


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_csv(results: Sequence[Result], target: Path) -> None:
    """Write one CSV line for each run, failed ones included."""
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "seed", *NAMES, "problems"])
        for result in results:
            figures = result.figures()
            values = [figures.get(name, "") for name in NAMES]
            writer.writerow([result.kind, result.seed, *values, "; ".join(result.problems)])


def to_dict(
    results: Sequence[Result], table: Sequence[KindRow], claimed: Sequence[str], grid: Rates, scale: str
) -> dict[str, Any]:
    """Return everything for JSON."""
    return {
        "scale": scale,
        "versions": installed_versions(),
        "rows": [
            {
                "kind": row.kind,
                "figures": {
                    n: {"mean": row.middle(n), "std": row.spread(n), "by_seed": v} for n, v in row.values.items()
                },
                "problems": row.problems,
            }
            for row in table
        ],
        "claims": [
            {
                "claim": verdict.claim.text,
                "kind": verdict.kind,
                "baseline": verdict.baseline,
                "values": verdict.values,
                "reached": verdict.reached,
            }
            for kind in claimed
            for verdict in verdicts(table, kind)
        ],
        "grid": grid,
        "runs": [
            {"kind": r.kind, "seed": r.seed, "summary": r.summary, "evaluation": r.evaluation, "problems": r.problems}
            for r in results
        ],
    }
