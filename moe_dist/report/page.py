"""Assembly of the report: figures, tables and plotly's own script in one file that needs no network."""

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moe_dist import __version__
from moe_dist.errors import MoeDistError
from moe_dist.report import curves, head, maps, tables
from moe_dist.report.read import RunFiles

# The page loads nothing from the network; its figures need only its own scripts and styles.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
:root { color-scheme: light; --soft: #5f6b7a; --line: #e1e5ea; --own: #2f6fde; }
html { overflow-y: scroll; }  /* so that the first figures have the width that they keep */
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 0 12px 48px;
       max-width: 1280px; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2em; border-top: 1px solid #ccc; padding-top: .8em; }
h3 { font-size: 1rem; margin: 1.4em 0 .3em; } section h3 { margin-top: 0; }
h1, h2, p { overflow-wrap: anywhere; } td.long, th.long { overflow-wrap: anywhere; min-width: 9em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 24px;
        margin-top: 1.4em; }
.grid > section { min-width: 0; overflow: hidden; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; } th, td { text-align: left; padding: .25em .8em .25em 0;
        border-bottom: 1px solid #e5e5e5; vertical-align: top; min-width: 4.5em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 16px;
         margin: 1em 0 2em; }
article { border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; min-width: 0; }
article h2 { border: 0; margin: 0 0 .3em; padding: 0; } article p { margin: 0; color: var(--soft); font-size: .82rem; }
.big { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px; margin-top: 14px; }
.big b { display: block; font-size: 1.55rem; font-weight: 650; color: var(--own); font-variant-numeric: tabular-nums; }
.big span { display: block; color: var(--soft); font-size: .76rem; line-height: 1.3; }
td { font-variant-numeric: tabular-nums; } details { margin: 1em 0; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 480px) { .big b { font-size: 1.2rem; } article { padding: 12px; } }
@media print { body { max-width: none; } .grid { grid-template-columns: 1fr 1fr; }
               section, article, tr { break-inside: avoid; } details:not([open]) { display: none; } }
.many td, .many th { overflow-wrap: normal; } .many td:not(:nth-child(2)) { white-space: nowrap; }
.many td:nth-child(2) { min-width: 9em; } .many td:first-child { position: sticky; left: 0; background: #fff; }
.problem { color: #a00; } .note { color: #666; font-size: .87rem; margin: .2em 0 0; }
"""

ALONE = "A report of up to six runs also draws each run's loads, clusters, traffic and times."


def write_report(runs: Sequence[RunFiles], target: Path) -> None:
    """Write the page atomically.

    Raises:
        MoeDistError: the file cannot be written.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        partial.write_text(page(runs), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise MoeDistError(f"{target}: cannot be written: {error.strerror}") from error


def page(runs: Sequence[RunFiles]) -> str:
    """Return the report as HTML."""
    many = len(runs) > head.MOST_CARDS
    title = f"{len(runs)} runs" if many else escape(", ".join(run.label for run in runs))
    numbers = iter(range(10**6))
    parts = [_together(runs, numbers), *(_folded(run) if many else _run(run, numbers) for run in runs)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head>\n"
        f"<body><h1>{title}</h1>{''.join(parts)}"
        f'<p class="note">moe-dist {escape(__version__)}; figures are defined in docs/metrics.md</p>'
        "</body></html>\n"
    )


def _together(runs: Sequence[RunFiles], numbers: Iterator[int]) -> str:
    figures = (
        ("Loss", curves.loss(runs), curves.not_comparable(runs)),
        ("Throughput", curves.throughput(runs), ""),
        ("Memory", curves.memory(runs), "At each logged step."),
        ("Balance of the experts", curves.balance(runs), "0 would be perfect."),
        ("Learning rate", curves.learning_rate(runs), ""),
        ("Gradient norm", curves.gradient_norm(runs), "Before clipping."),
    )
    compared = f"<h2>Side by side</h2>{tables.comparison(runs)}" if len(runs) > 1 else ""
    hint = f"<h2>Each run</h2><p class=note>{ALONE}</p>" if len(runs) > head.MOST_CARDS else ""
    return head.cards(runs) + _grid(figures, numbers) + compared + head.differences(runs) + hint


def _run(run: RunFiles, numbers: Iterator[int]) -> str:
    figures = (
        ("Load of the experts", maps.load_map(run), "1 is a fair share."),
        ("Clusters behind", maps.behind_map(run), "Deferred updates of offloaded clusters: steps without a token."),
        ("Busiest over mean", maps.balance(run), "Mean over layers; a rank is a place in the expert-parallel group."),
        ("Cluster membership", maps.membership(run), "Each change is a re-clustering."),
        ("Traffic from rank to rank", maps.traffic(run), "All-to-all of the whole run; what a rank keeps is left out."),
        ("Time of a step", maps.profile(run), "With every collective synchronised."),
    )
    title = f"<h2>{escape(run.label)}</h2><p>{escape(run.status)}</p>{_problems(run)}"
    return title + head.at_work(run) + _grid(figures, numbers) + _lists(run)


def _folded(run: RunFiles) -> str:
    """Return one of many runs without figures, of which a page cannot draw hundreds."""
    title = f"<summary><b>{escape(run.label)}</b>: {escape(run.status)}</summary>"
    return f"<details>{title}{head.at_work(run)}{_lists(run)}</details>{_problems(run)}"


def _problems(run: RunFiles) -> str:
    return "".join(f'<p class="problem">{escape(problem)}</p>' for problem in run.problems)


def _lists(run: RunFiles) -> str:
    lists = (
        ("Sources of text", tables.sources(run)),
        ("Re-clusterings", tables.reclusterings(run)),
        ("Events", tables.other_events(run)),
    )
    listed = "".join(f"<h3>{title}</h3>{content}" for title, content in lists if content)
    return listed + head.configuration(run)


def _grid(figures: Sequence[tuple[str, go.Figure | None, str]], numbers: Iterator[int]) -> str:
    """Return the available figures, each with its title and a note below it."""
    sections = [
        f"<section><h3>{escape(title)}</h3>{_html(figure, next(numbers))}"
        f"{f'<p class=note>{escape(note)}</p>' if note else ''}</section>"
        for title, figure, note in figures
        if figure is not None
    ]
    return f'<div class="grid">{"".join(sections)}</div>'


def _html(figure: go.Figure, index: int) -> str:
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{index}",
        default_height=f"{figure.layout.height}px",
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return html
