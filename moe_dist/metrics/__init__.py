"""Metrics and output of a run: load balance, run folder, progress display, final table."""

from moe_dist.metrics.host import installed_versions, peak_rss_bytes, rss_bytes, source_commit
from moe_dist.metrics.json_text import strict_json, write_json
from moe_dist.metrics.load_balance import LoadStatistics, load_statistics
from moe_dist.metrics.progress import Progress
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.metrics.summary import REQUIRED_KEYS, flatten, missing_keys
from moe_dist.metrics.summary_table import render_summary

__all__ = [
    "REQUIRED_KEYS",
    "LoadStatistics",
    "Progress",
    "RunFolder",
    "flatten",
    "installed_versions",
    "load_statistics",
    "missing_keys",
    "peak_rss_bytes",
    "render_summary",
    "rss_bytes",
    "source_commit",
    "strict_json",
    "write_json",
]
