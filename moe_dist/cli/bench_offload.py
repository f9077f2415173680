"""`moe-dist bench offload`: bytes moved by offloaded training against the share of active clusters."""

from pathlib import Path

from moe_dist.benchmarks.offload_spec import OffloadBenchSpec
from moe_dist.cli.options import Json, takes
from moe_dist.console import wide_console
from moe_dist.metrics import write_json


@takes(spec=OffloadBenchSpec)
def bench_offload(spec: OffloadBenchSpec, json_file: Json = None) -> None:
    """Count the bytes that a step with offloaded clusters moves, with few and with all clusters active."""
    from moe_dist.benchmarks import offload

    cases = offload.run_offload_bench(spec)
    offload.render(spec, cases, wide_console())
    if json_file is not None:
        write_json(Path(json_file), offload.to_dict(spec, cases))
