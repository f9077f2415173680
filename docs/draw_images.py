"""Images of the README: a token's way, and the last screen of a run.

python docs/draw_images.py way                      # docs/images/token-way.svg
python docs/draw_images.py screen runs/demo         # docs/images/last-screen.svg, from the run's summary.json
"""

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from moe_dist.metrics import render_summary

IMAGES = Path(__file__).parent / "images"
INK, SOFT, LINE = "#1f2933", "#5f6b7a", "#c5ccd6"
FLAT, OWN, THIN = "#d9822b", "#2f6fde", "#93b7f5"
BYTES = {  # per token and layer, measured: docs/results.md, "What crosses between ranks" and "Eight bits on the wire"
    "flat routing, k=2": (1536.8, FLAT),
    "two clusters a token (good)": (1553.3, OWN),
    "one cluster a token (cheap)": (766.4, OWN),
    "the same, int8 on the wire": (396.1, OWN),
}


def text(
    x: float, y: float, words: str, size: int = 13, color: str = INK, anchor: str = "start", bold: int = 400
) -> str:
    """Return words at a point."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" font-weight="{bold}">'
        f"{words}</text>"
    )


def box(x: float, y: float, width: float, height: float, fill: str = "#fff", line: str = LINE) -> str:
    """Return a rectangle with round corners."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{line}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float, color: str) -> str:
    """Return a curved arrow to the right."""
    bend = (x + to_x) / 2
    return (
        f'<path d="M{x} {y} C{bend} {y} {bend} {to_y} {to_x - 7} {to_y}" fill="none" stroke="{color}" '
        'stroke-width="2.4"/>'
        f'<path d="M{to_x} {to_y} l-9 -5 v10 z" fill="{color}"/>'
    )


def ranks(x: float, y: float, names: tuple[str, ...]) -> str:
    """Return a column of ranks with the names of what they hold."""
    parts = []
    for index, name in enumerate(names):
        top = y + 46 * index
        parts += [
            box(x, top, 176, 38),
            text(x + 10, top + 24, f"rank {index}", 12, SOFT),
            text(x + 64, top + 24, name, 12),
        ]
    return "".join(parts)


def flat_routing(x: float, y: float) -> str:
    """Return the way of a token that is sent to the rank of each of its experts."""
    held = ("experts 1 to 8", "experts 9 to 16", "experts 17 to 24", "experts 25 to 32")
    return "".join([
        text(x, y, "Flat routing", 16, FLAT, bold=600),
        text(x, y + 20, "every token to each of its k experts: k copies, k full networks", 12, SOFT),
        box(x, y + 94, 78, 38, "#fff7ee", FLAT), text(x + 39, y + 118, "token", 13, anchor="middle"),
        arrow(x + 78, y + 106, x + 170, y + 108, FLAT), arrow(x + 78, y + 122, x + 170, y + 200, FLAT),
        ranks(x + 172, y + 42, held),
        text(x + 110, y + 98, "copy", 11, FLAT, "middle"), text(x + 116, y + 184, "copy", 11, FLAT, "middle"),
    ])  # fmt: skip


def two_stages(x: float, y: float) -> str:
    """Return the way of a token that is sent to its cluster once."""
    held = ("cluster A", "cluster B", "cluster C", "cluster D")
    inner_x, inner_y = x + 372, y + 60
    return "".join([
        text(x, y, "Two-stage routing over clusters", 16, OWN, bold=600),
        text(x, y + 20, "a token to its cluster, once; there it chooses k of the cluster's experts", 12, SOFT),
        box(x, y + 94, 78, 38, "#eef4ff", OWN), text(x + 39, y + 118, "token", 13, anchor="middle"),
        arrow(x + 78, y + 113, x + 170, y + 108, OWN), text(x + 122, y + 98, "one copy", 11, OWN, "middle"),
        ranks(x + 172, y + 42, held),
        arrow(x + 350, y + 108, inner_x, y + 108, OWN),
        box(inner_x, inner_y, 190, 132, "#eef4ff", OWN),
        text(inner_x + 95, inner_y + 18, "cluster B", 12, OWN, "middle", 600),
        box(inner_x + 12, inner_y + 28, 76, 88, OWN, OWN),
        text(inner_x + 50, inner_y + 70, "base", 13, "#fff", "middle"),
        text(inner_x + 50, inner_y + 86, "once a token", 10, "#fff", "middle"),
        *(box(inner_x + 102 + 20 * i, inner_y + 28, 11, 88, OWN if i in (1, 3) else THIN, "none") for i in range(4)),
        text(inner_x + 140, inner_y + 128, "low-rank residuals", 10, SOFT, "middle"),
    ])  # fmt: skip


def bars(x: float, y: float) -> str:
    """Return the measured bytes as bars."""
    parts = [text(x, y, "Bytes between four ranks, per token and layer, forward and backward (measured)", 13, bold=600)]
    for index, (name, (value, color)) in enumerate(BYTES.items()):
        top, width = y + 14 + 26 * index, value / 1600 * 560
        parts += [text(x + 190, top + 14, name, 12, SOFT, "end")]
        parts += [f'<rect x="{x + 200}" y="{top}" width="{width:.0f}" height="18" rx="3" fill="{color}"/>']
        parts += [text(x + 208 + width, top + 14, f"{value:,.0f}", 12)]
    return "".join(parts)


def draw_way() -> str:
    """Return the picture of a token's way as SVG."""
    parts = [flat_routing(28, 40), two_stages(428, 40), bars(28, 300)]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1020 430" font-family="system-ui, sans-serif" role="img" '
        'aria-label="A token is sent once to its cluster instead of to each of its experts">'
        f'<rect width="1020" height="430" rx="10" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def draw_screen(run: Path) -> str:
    """Return the closing table of a run as SVG."""
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    render_summary(summary, console, Path("runs", run.name), Path("runs", run.name, "run.png"))
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="make demo"), flags=re.DOTALL)  # no network


def main() -> None:
    """Write the image that the arguments name."""
    if sys.argv[1] == "way":
        (IMAGES / "token-way.svg").write_text(draw_way(), encoding="utf-8")
    else:
        (IMAGES / "last-screen.svg").write_text(draw_screen(Path(sys.argv[2])), encoding="utf-8")


if __name__ == "__main__":
    main()
