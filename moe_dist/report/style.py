"""Layout of the report's figures: one for all, narrow enough for a phone."""

from typing import Any

import plotly.graph_objects as go

COLORS = ("#3366cc", "#dc6900", "#109618", "#990099", "#0099a8", "#b82e2e", "#66780f", "#5574a6")
HEIGHT = 320


def figure(x_title: str, y_title: str, **layout: Any) -> go.Figure:
    """Return an empty figure with both axes named."""
    made = go.Figure()
    made.update_layout(
        template="none",
        colorway=COLORS,
        height=HEIGHT,
        autosize=True,
        margin={"l": 56, "r": 12, "t": 12, "b": 40},
        legend={"orientation": "h", "y": -0.22, "x": 0},
        font={"family": "system-ui, sans-serif", "size": 12},
        hovermode="closest",
        xaxis={"title": {"text": x_title, "standoff": 6}, "gridcolor": "#e5e5e5", "zeroline": False},
        yaxis={
            "title": {"text": y_title, "standoff": 6},
            "gridcolor": "#e5e5e5",
            "zeroline": False,
            "automargin": True,
        },
    )
    made.update_layout(**layout)
    return made


def color(index: int, runs: int) -> str:
    """Return the color of the run at `index`: of a list, or for more runs than it has, from blue to red in order."""
    return COLORS[index] if runs <= len(COLORS) else f"hsl({240 * (1 - index / (runs - 1)):.0f}, 65%, 45%)"


def categories(count: int) -> list[tuple[float, str]]:
    """Return a color scale of `count` steps, one color for each number from 0 on."""
    edges = [(index / count, (index + 1) / count, _category(index)) for index in range(count)]
    return [(edge, name) for low, high, name in edges for edge in (low, high)]


def _category(index: int) -> str:
    """Return a color by the golden angle, so that neighbors differ; lightness alternates."""
    return f"hsl({index * 137.5 % 360:.0f}, 62%, {(46, 66, 34)[index % 3]}%)"


def chooser(labels: list[str], shown: int = 0) -> list[dict[str, Any]]:
    """Return a drop-down that shows one of the figure's traces at a time, at first the one at `shown`."""
    return [
        {
            "type": "dropdown",
            "active": shown,
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "buttons": [
                {"label": label, "method": "restyle", "args": ["visible", [i == chosen for i in range(len(labels))]]}
                for chosen, label in enumerate(labels)
            ],
        }
    ]
