"""`moe-dist measure traffic`: a few training steps of each kind of layer, with the bytes between ranks.

Every rank of the job calls `measure_traffic`. Steps come in three rounds on the same model: timed without changes;
counted, with the routing recorded; and on request profiled, with every collective synchronized.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_dist.benchmarks.baselines import traffic as peer
from moe_dist.benchmarks.collective_timer import CollectiveTimer, StepPhase, timing_collectives
from moe_dist.benchmarks.traffic import tables as traffic_view
from moe_dist.benchmarks.traffic.figures import gather_figures, gather_seconds
from moe_dist.benchmarks.traffic.spec import TrafficSpec
from moe_dist.config import RunConfig, dump_config, resolve_batch, resolve_world
from moe_dist.console import wide_console
from moe_dist.data import PreparedData, prepare_data
from moe_dist.dispatch.routing_trace import RoutingTrace
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.metrics import RunFolder, write_json
from moe_dist.metrics.recorder import NullRecorder
from moe_dist.training.preemption import StopSignals
from moe_dist.training.trainer import Trainer

KEPT_ROWS = 4096
Figures = dict[str, Any]


def measure_traffic(config: RunConfig, spec: TrafficSpec) -> None:
    """Measure every kind, and print and write the figures on rank 0; collective.

    Raises:
        MoeDistError: a kind cannot be run with this configuration and number of ranks.
    """
    with timing_collectives() as timer:  # before DeepSpeed is initialised
        process = init_distributed(config.world)
        kinds = spec.kinds_for(config)
        configs = {kind: spec.config_for(config, kind) for kind in kinds if kind not in peer.PEERS}
        data = prepare_data(config.corpus, config.tokenizer)
        results = {kind: _Measurement(single, process, data, timer).take(spec) for kind, single in configs.items()}
        for name in filter(peer.PEERS.__contains__, kinds):
            results[name] = peer.measure_peer(name, config, process, timer, spec.steps, spec.warmup)
    if process.rank == 0:
        traffic_view.render(results, wide_console())
        if spec.json_file is not None:
            write_json(Path(spec.json_file), results)
    shutdown()


class _Measurement:
    """Measurement of one kind of layer."""

    def __init__(self, config: RunConfig, process: RankInfo, data: PreparedData, timer: CollectiveTimer) -> None:
        self.config, self.process, self.timer = config, process, timer
        shape = resolve_world(config, process.ranks)
        resolve_batch(config, process.ranks)
        self.steps_done, self.signals = 0, StopSignals()  # not entered: signals end a measurement
        self.folder: RunFolder | None = None
        if process.rank == 0:
            name = f"{config.name}-traffic-{config.moe.kind}"
            self.folder = RunFolder.create(config.runs_dir, name, dump_config(config), tensorboard=False)
            print(f"{name}: {shape}", flush=True)
        self.run = Trainer(config, process, shape, data, NullRecorder(self.folder.path if self.folder else None))
        self.ledger = self.run.model.context.ledger

    def take(self, spec: TrafficSpec) -> Figures:
        """Run all rounds, write the figures to the run folder, and return them (complete on rank 0)."""
        self._steps(spec.warmup)
        seconds = self._steps(spec.steps)
        self.ledger.clear()
        observed = RoutingTrace(self.process.rank, self.ledger.links.node_of_rank, KEPT_ROWS)
        self.ledger.observer = observed
        self._steps(spec.steps)
        self.ledger.observer, self.ledger.recording = None, False
        figures = gather_figures(self.run, observed, spec.steps)
        figures["step_seconds"], figures["timed_seconds"] = float(np.median(seconds)), seconds
        if spec.profile:
            figures["profile"] = self._profile(spec.steps)
        if self.folder is not None:
            self._write(self.folder, figures, observed)
        return figures

    def _steps(self, steps: int) -> list[float]:
        """Train some steps; return the seconds of each step."""
        seconds = []
        for _ in range(steps):
            self.steps_done += 1
            started = time.perf_counter()
            self.run.train_step(self.steps_done, self.signals)
            seconds.append(time.perf_counter() - started)
        return seconds

    def _profile(self, steps: int) -> Figures:
        """Return the mean seconds of a step by part on every rank, then trace one more step."""
        self.timer.clear()
        self.timer.active = True
        total = sum(self._steps(steps))
        parts = dict(self.timer.seconds)
        parts[StepPhase.COMPUTE] = total - sum(parts.values())
        mine = [parts.get(part, 0.0) / steps for part in StepPhase]
        self._trace()
        self.timer.active = False
        ranks = [dict(zip(map(str, StepPhase), row, strict=True)) for row in gather_seconds(mine, self.process)]
        return {"steps": steps, "ranks": ranks}

    def _trace(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.process.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if self.folder is None:
            self._steps(1)
            return
        with torch.profiler.profile(activities=activities) as profiler:
            self._steps(1)
        profiler.export_chrome_trace(str(self.folder.path / "trace.json.gz"))

    def _write(self, folder: RunFolder, figures: Figures, observed: RoutingTrace) -> None:
        with folder:
            folder.write_traffic(figures)
            if "profile" in figures:
                write_json(folder.path / "profile.json", figures["profile"])
            arrays: dict[str, Any] = {
                f"layer{layer}.{stage}": torch.cat(list(rows)).numpy().astype(np.int32)
                for (layer, stage), rows in observed.choices.items()
            }
            np.savez_compressed(folder.path / "routing.npz", **arrays)
            folder.event("measured", self.steps_done, steps=figures["steps"])
