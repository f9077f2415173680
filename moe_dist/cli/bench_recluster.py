"""`moe-dist bench recluster`: cost of a re-clustering round."""

from pathlib import Path

from moe_dist.benchmarks.recluster_spec import ReclusterBenchSpec
from moe_dist.cli.options import Json, takes
from moe_dist.console import wide_console
from moe_dist.metrics import write_json


@takes(spec=ReclusterBenchSpec)
def bench_recluster(spec: ReclusterBenchSpec, json_file: Json = None) -> None:
    """Measure CPU time of the parts of a re-clustering round: similarity, assignment, factorization; one process."""
    from moe_dist.benchmarks import recluster

    console = wide_console()
    result = recluster.run_recluster_bench(spec, console.print)
    recluster.render(result, console)
    if json_file is not None:
        write_json(Path(json_file), result.to_dict())
