"""Report: one self-contained page about one run or several."""

from moe_dist.report.page import write_report
from moe_dist.report.read import RunFiles, read_runs

__all__ = ["RunFiles", "read_runs", "write_report"]
