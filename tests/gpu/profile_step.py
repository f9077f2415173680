"""Profile of some training steps in this process: kernels by time, idle share of the device, host work in its gaps."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from moe_dist.config import load_config, resolve_batch, resolve_world
from moe_dist.distributed.init import init_distributed, shutdown
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.model.language_model import LanguageModel

WARMUP, STEPS, VOCABULARY, GAPS = 3, 3, 4096, 12


def main() -> None:
    """Prints the tables."""
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    process = init_distributed(config.world)
    batch, mesh = resolve_batch(config, 1), Mesh.create(resolve_world(config, 1))
    model = LanguageModel(config, VOCABULARY, mesh, Links.discover(process.device), batch.accumulation)
    engine = DeepSpeedEngine(model, config, batch, process)
    shape = (config.train.global_batch_size, config.model.sequence_length + 1)
    sequences = torch.randint(VOCABULARY, shape, device=process.device)

    def steps(count: int) -> None:
        for _ in range(count):
            engine.update(engine.forward_backward(sequences), 1e-4)
        if process.device.type == "cuda":
            torch.cuda.synchronize()

    steps(WARMUP)
    cuda = process.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        steps(STEPS)
    column = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=column, row_limit=40, max_name_column_width=90))
    if cuda:
        _print_gaps(list(found.events() or []))
        print(f"peak {torch.cuda.max_memory_allocated():,} bytes")
    shutdown()


def _print_gaps(events: list[Any]) -> None:
    on_device = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    end, busy, gaps = on_device[0][0], 0.0, []
    for start, stop in on_device:
        if start > end:
            gaps.append((start - end, end, start))
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    wall = end - on_device[0][0]
    print(f"device busy {busy / wall:.1%} of {wall / STEPS / 1000:.2f} ms a step")
    print("its longest gaps, us, with the host's work:")
    for length, start, stop in sorted(gaps, reverse=True)[:GAPS]:
        inside = [event for event in on_host if event.time_range.start < stop and event.time_range.end > start]
        inside.sort(key=lambda event: event.time_range.end - event.time_range.start)
        print(f"{length:10.0f}  {', '.join(dict.fromkeys(event.name for event in inside[:6]))}")


main()
