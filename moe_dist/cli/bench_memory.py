"""`moe-dist bench memory`: memory of training."""

from pathlib import Path

from moe_dist.benchmarks import memory
from moe_dist.cli.options import Json, takes
from moe_dist.console import wide_console
from moe_dist.metrics import write_json


@takes(spec=memory.MemoryBenchSpec)
def bench_memory(spec: memory.MemoryBenchSpec, json_file: Json = None) -> None:
    """Compare the memory of training with dense, standard, clustered and offloaded experts, a process for each case."""
    console = wide_console()
    result = memory.run_memory_bench(spec, console.print)
    memory.render(result, console)
    if json_file is not None:
        write_json(Path(json_file), result.to_dict())
