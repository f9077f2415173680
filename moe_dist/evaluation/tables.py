"""Tables of an evaluation in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.console import titled_table

LARGEST_PLAIN = 1e6
"""Perplexity from which on it is shown as a power of ten: a word of many tokens that the model does not know."""
PERPLEXITIES = {
    "token_perplexity": "a token of the run's tokenizer",
    "word_perplexity": "a word or line end, as WikiText's literature counts",
    "plain_word_perplexity": "a word, line ends not counted",
}


def render(figures: Mapping[str, Any], console: Console) -> None:
    """Print the model and each task."""
    model = f"{figures['name']}: {figures['kind']}, step {figures['step']}, seed {figures['seed']}"
    console.print(f"{model}; {figures['ranks']} rank(s), {figures['dtype']}", highlight=False)
    if "offload" in figures:
        found = figures["offload"]
        moved = f"at most {found['peak_device_bytes']:,} bytes of experts on a rank's device at once"
        console.print(f"offloaded: {moved}, {found['bytes_in']:,} brought in", highlight=False)
    for name in ("held_out", "wikitext"):
        if name in figures:
            console.print(_perplexity(figures[name]))
    if "glue" in figures:
        console.print(_glue(figures["glue"]))
        if missing := figures["glue"]["missing"]:
            console.print(f"no data, so left out of the average: {', '.join(missing)}", highlight=False)
    if "lm_eval" in figures:
        console.print(_harness(figures["lm_eval"]))


def _perplexity(found: Mapping[str, Any]) -> Table:
    title = f"loss and perplexity on {found['source']}: windows of {found['window']} tokens, stride {found['stride']}"
    table = titled_table(title, "", "", show_header=False)
    table.add_row(f"{found['bits_per_byte']:.4f}", "bits a byte")
    table.add_row(f"{found['loss']:.4f}", f"nats a token, over {found['tokens']:,} tokens")
    for name, of in PERPLEXITIES.items():
        value = found[name]
        table.add_row(f"{value:,.3f}" if value < LARGEST_PLAIN else f"{value:.2e}", f"perplexity of {of}")
    return table


def _glue(found: Mapping[str, Any]) -> Table:
    title = "GLUE after fine-tuning, validation splits, percent (mean ± standard deviation over seeds)"
    table = titled_table(title, "task", "metric")
    for name in ("score", "train rows", "rows"):
        table.add_column(name, justify="right")
    for task, figures in found["tasks"].items():
        rows = f"{sum(figures['validation_rows'].values()):,}"
        for metric, values in figures["metrics"].items():
            table.add_row(task, metric.replace("_", " "), with_spread(values), f"{figures['train_rows']:,}", rows)
    table.add_section()
    table.add_row("average", "", with_spread(found["average"]))
    if found["average_without_wnli"] is not None:
        table.add_row("without WNLI", "", with_spread(found["average_without_wnli"]))
    return table


def _harness(found: Mapping[str, Any]) -> Table:
    table = titled_table("lm-evaluation-harness", "task", "metric, filter")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for task, metrics in found["tasks"].items():
        for metric, value in metrics.items():
            name, _, filtered = metric.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{filtered}")
                table.add_row(task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    return table


def with_spread(found: Mapping[str, Any]) -> str:
    """Format a mean, with its standard deviation if there is one."""
    return f"{found['mean']:.1f}" + ("" if found["std"] is None else f" ± {found['std']:.1f}")
