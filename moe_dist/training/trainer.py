"""A training run from configuration to summary, as one of its ranks."""

import hashlib
import math
import shutil
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from moe_dist.checkpoint.stateful import Stateful
from moe_dist.config import RunConfig, WorldShape, resolve_batch, resolve_world
from moe_dist.data import PreparedData, SequenceLoader, prepare_data, sequence_count
from moe_dist.data.prepare import TOKENIZER
from moe_dist.dispatch.traffic_ledger import TrafficLedger
from moe_dist.distributed.collective_errors import raise_on_all_ranks
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine, StepOutcome
from moe_dist.errors import DataError, TrainingError
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.metrics import installed_versions, process_seconds
from moe_dist.metrics.recorder import Recorder, perplexity
from moe_dist.model.language_model import LanguageModel, count_parameters
from moe_dist.recluster.coordinator import Coordinator
from moe_dist.training.checkpointing import RunCheckpoints
from moe_dist.training.finished_run import show_if_finished
from moe_dist.training.learning_rate import learning_rate
from moe_dist.training.load_metrics import LoadRecord, last_fifth
from moe_dist.training.overlap_choice import OverlapChoice
from moe_dist.training.preemption import StopSignals
from moe_dist.training.resume import Resumption, data_record, find_resumption, open_recorder
from moe_dist.training.run_history import RunHistory
from moe_dist.training.summary_metrics import (
    all_to_all_totals,
    memory_now,
    model_bytes,
    peak_memory,
    traffic_matrices,
)
from moe_dist.training.validation import validation_loss
from moe_dist.training.warmup import Trained, cluster_experts
from moe_dist.training.watchdog import Watchdog, end_process, watched_seconds


def train(config: RunConfig, give_up: Callable[[Exception], None] = end_process) -> bool:
    """Trains the configured model; every rank of the job calls this.

    Args:
        give_up: ends this process with an error while its main thread hangs.

    Returns:
        Whether it stopped before its last step because it was asked to (`interrupt.py`); a checkpoint is there then.

    Raises:
        MoeDistError: the data, the launch or the training fails in a way that the user can act upon.
    """
    process = init_distributed(config.world)
    shape = resolve_world(config, process.ranks)
    if show_if_finished(config, process.rank):
        shutdown()
        return False
    if process.rank == 0:
        print(f"{config.name}: reading the {config.corpus.kind} text and its tokenizer", flush=True)
    data = prepare_data(config.corpus, config.tokenizer)
    _require_same_data(data, process)
    resumption = find_resumption(config, data)
    recorder = open_recorder(config, process.rank, resumption)
    if recorder.folder is not None:
        shutil.copyfile(data.tokenizer_path, recorder.folder / TOKENIZER)  # what evaluates the run may lack its text
    with recorder, StopSignals() as signals:
        run = Trainer(config, process, shape, data, recorder, 0 if resumption is None else resumption.step)

        def hangs(error: TrainingError) -> None:
            recorder.event("failed", run.steps_done, error=str(error))
            give_up(error)

        with run, Watchdog(watched_seconds(config), run.checkpoints.run, process.rank, hangs) as watchdog:
            if resumption is not None:
                run.resume(resumption)
            stopped = run.run(signals, watchdog.alive)
    shutdown()
    return stopped


class Trainer:
    """The loop and its account of time, loads and losses."""

    def __init__(
        self,
        config: RunConfig,
        process: RankInfo,
        shape: WorldShape,
        data: PreparedData,
        recorder: Recorder,
        steps_done: int = 0,
    ) -> None:
        self.config, self.process, self.shape, self.data, self.recorder = config, process, shape, data, recorder
        self.batch = resolve_batch(config, process.ranks)
        self.mesh = Mesh.create(shape, process.timeout)
        self.ledger = TrafficLedger(Links.discover(process.device))
        self.trained = Trained(*self._build(config.phase_after(steps_done)))
        self.loader = SequenceLoader(
            data.train,
            config.model.sequence_length,
            config.train.global_batch_size,
            config.seed,
            process.rank,
            process.ranks,
        )
        sequence_count(data.validation, config.model.sequence_length)  # too little is said now, not at the first use
        self.tokens_per_step = config.train.global_batch_size * config.model.sequence_length
        tokens = self.batch.micro * config.model.sequence_length
        self.overlap = OverlapChoice(config, shape, self.ledger.links, process.device, tokens, recorder)
        self.coordinator = Coordinator(self.engine, config, recorder)
        self.loads = self._load_record()
        self.account, self.steps_done = RunHistory(), steps_done
        self.first_step_seconds: float | None = None
        self.checkpoints = RunCheckpoints(config, self.engine, data_record(data), self._parts(), recorder)

    @property
    def model(self) -> LanguageModel:
        """The model of the present phase: a standard warm-up's, then the clustered one."""
        return self.trained.model

    @property
    def engine(self) -> DeepSpeedEngine:
        """The engine that trains it; as short-lived."""
        return self.trained.engine

    def _build(self, config: RunConfig) -> tuple[LanguageModel, DeepSpeedEngine]:
        links, accumulation = self.ledger.links, self.batch.accumulation
        self.memory = None
        try:
            with raise_on_all_ranks():  # a rank's directory or disk may fail where those of the others do not
                self.memory = self._expert_memory(config)
            with raise_on_all_ranks():
                model = LanguageModel(
                    config, self.data.vocab_size, self.mesh, links, accumulation, self.ledger, self.memory
                )
            return model, DeepSpeedEngine(model, config, self.batch, self.process)
        except BaseException:
            self.__exit__()
            raise

    def _expert_memory(self, config: RunConfig) -> ExpertMemory | None:
        if not config.memory.offload:
            return None
        per_layer = config.moe.clusters // self.shape.cluster
        return ExpertMemory(config, per_layer, self.process.rank, self.process.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives up what the run has kept outside of memory."""
        if self.memory is not None:
            self.memory.close()

    def _load_record(self) -> LoadRecord:
        moe, layers = self.model.config.moe, self.config.model.layers
        copies = moe.top_k * (moe.top_clusters if moe.kind == "clustered" else 1)
        return LoadRecord(moe.experts, self.shape, self.tokens_per_step * layers * copies)

    def _parts(self) -> dict[str, Stateful]:
        """What checkpoints hold besides the model and its optimizer."""
        parts: dict[str, Stateful] = {
            "account": self.account,
            "traffic": self.ledger,
            "coordinator": self.coordinator,
            "overlap": self.overlap,
        }
        if self.model.context.statistics is not None:
            parts["statistics"] = self.model.context.statistics
        return parts

    def resume(self, resumption: Resumption) -> None:
        """Puts everything into the state of a checkpoint; collective."""
        self.checkpoints.restore(resumption)

    def run(self, signals: StopSignals, alive: Callable[[str], None] = lambda doing: None) -> bool:
        """Does the steps that are left, telling `alive` what it is about to do.

        Returns:
            Whether it stopped before the last step because a rank was asked to.
        """
        train = self.config.train
        self.recorder.note(self._description())
        self.coordinator.begin(self.steps_done)
        self.overlap.apply(self.model, self.steps_done)
        with self.checkpoints:
            for step in range(self.steps_done + 1, train.steps + 1):
                alive(f"step {step}")
                stop_asked, last = self.train_step(step, signals), step == train.steps
                if last or (train.eval_every and step % train.eval_every == 0):
                    alive(f"the evaluation after step {step}")
                    self._evaluate(step)
                self.checkpoints.after_step(step)
                self.steps_done = step
                if stop_asked and not last:
                    alive("the checkpoint before a stop")
                    self._stop(step)
                    return True
            alive("the end of the run")
            self._finish()
        return False

    def _stop(self, step: int) -> None:
        self.checkpoints.stop(step)
        self.recorder.note(f"asked to stop: stopped after step {step}, with a checkpoint")
        self.recorder.event("stopped", step)

    def train_step(self, step: int, signals: StopSignals) -> bool:
        """One step; returns whether a rank has asked to stop after it."""
        started = time.perf_counter()
        self.coordinator.before_step(step)
        sequences_BS = self.loader.batch(step - 1)
        outcome = self.engine.forward_backward(sequences_BS, lambda: signals.wanted)
        _stop_if_broken(step, outcome)
        if outcome.stop:
            signals.reached()
        rate = learning_rate(step, self.config.train, self.config.optimizer.learning_rate)
        norm = self.engine.update(outcome, rate)
        _stop_if_norm_broken(step, norm)
        if self.first_step_seconds is None:
            self.first_step_seconds = process_seconds()
        if self.config.moe.kind != "dense":  # by the placement that routed them
            placements = self.model.context.placements
            self.account.loads.append(self.loads.add(outcome.count_LE.numpy(), outcome.dropped, placements))
        self.coordinator.after_step(step, outcome, sequences_BS, lambda: self.loader.batch(step))
        self.account.step_seconds.append(time.perf_counter() - started)
        if step % self.config.train.log_every == 0 or step in (1, self.config.train.steps):
            self.recorder.step(step, self._figures(step, outcome, rate, norm))
            if self.account.loads:
                self._record_loads(step)
        if step == self.config.standard_steps:
            self._cluster_experts(step)
        return outcome.stop

    def _record_loads(self, step: int) -> None:
        self.recorder.load(step, {**self.loads.take_counts(), "load": self.account.loads[-1]})

    def _cluster_experts(self, step: int) -> None:
        """Ends the standard warm-up; the two batches that follow tell what experts are given."""
        if self.loads.steps:
            self._record_loads(step)
        micro, device = self.batch.micro, self.process.device
        batches_BS = [self.loader.batch(step + ahead).to(device).split(micro) for ahead in (0, 1)]
        del self.coordinator  # it holds on to the model that is about to be freed, and so do
        self.checkpoints.let_go()
        figures = cluster_experts(self.trained, self.config, batches_BS, self._build)
        self.account.step_seconds[-1] += figures["seconds"]
        self.account.loads.clear()  # loads of standard experts have no clusters: other figures
        self.coordinator, self.loads = Coordinator(self.engine, self.config, self.recorder), self._load_record()
        self.checkpoints.follow(self.engine, self._parts())
        self.coordinator.begin(step)
        self.overlap.apply(self.model, step)
        self.recorder.event("clustered", step, **figures)

    def _figures(self, step: int, outcome: StepOutcome, rate: float, norm: float) -> dict[str, Any]:
        recent = self.account.step_seconds[-self.config.train.log_every :]
        train = {"loss": outcome.loss, "learning_rate": rate, "gradient_norm": norm}
        if self.config.moe.balance == "aux_loss":
            train["balance_loss"] = outcome.balance_loss
        if self.config.moe.z_loss_weight:
            train["z_loss"] = outcome.z_loss
        figures: dict[str, Any] = {
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": self.tokens_per_step / float(np.mean(recent)),
            "train": train,
            "memory": memory_now(self.process),
        }
        if self.account.loads:
            figures["load"] = self.account.loads[-1]
        return figures

    def _validation_loss(self) -> float:
        return validation_loss(self.model, self.data.validation, self.config, self.batch.micro, self.process)

    def _loss_as_stored(self) -> float | None:
        """With what would be stored of the experts; None where their factors are not stored in few bits."""
        if self.config.precision.residuals == "none":
            return None
        with self.model.with_quantized_experts():
            return self._validation_loss()

    def _evaluate(self, step: int) -> None:
        loss = self._validation_loss()
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the validation loss is {loss}: the weights are no longer finite")
        tokens = step * self.tokens_per_step
        self.account.curve.append({"step": step, "tokens": tokens, "loss": loss})
        self.recorder.evaluation(step, tokens, loss)

    def _finish(self) -> None:
        self.coordinator.close()
        config, steps = self.config, self.config.train.steps
        if not self.account.curve or self.account.curve[-1]["step"] != steps:
            self._evaluate(steps)  # resumed where another run, of more steps, was not evaluated
        self.checkpoints.finish(steps)
        counts, peaks = count_parameters(self.model), peak_memory(self.process)
        tokens, loss = steps * self.tokens_per_step, self.account.curve[-1]["loss"]
        whole, away = model_bytes(self.engine)
        self.recorder.traffic(traffic_matrices(self.ledger, self.process))
        timed = self.account.step_seconds[1:] or self.account.step_seconds  # the first step warms up
        self.recorder.finish(
            {
                "name": config.name,
                "kind": config.moe.kind,
                "steps": steps,
                "tokens": tokens,
                "seconds": sum(self.account.step_seconds),
                "first_step_seconds": self.first_step_seconds,
                "validation": {
                    "loss": loss,
                    "perplexity": perplexity(loss),
                    "loss_stored": self._loss_as_stored(),
                    "curve": self.account.curve,
                },
                "tokens_per_second": self.tokens_per_step * len(timed) / sum(timed),
                "parameters": vars(counts),
                "all_to_all": all_to_all_totals(self.ledger, tokens, config.model.layers, self.process),
                "load": last_fifth(self.account.loads),
                "recluster": self.coordinator.totals,
                "memory": {
                    "peak_rss_bytes": max(peaks.rss_by_rank),
                    "peak_rss_bytes_by_rank": peaks.rss_by_rank,
                    "peak_device_bytes": peaks.device,
                    "model_bytes": whole,
                    "offloadable_bytes": away,
                    "offload": None if self.memory is None else self.memory.tiers.totals(self.process.device),
                },
                "world": vars(self.shape),
                "seed": config.seed,
                "versions": installed_versions(),
            }
        )

    def _description(self) -> str:
        config, moe = self.config, self.config.moe
        experts = {
            "clustered": f"{moe.experts} experts in {moe.clusters} clusters, {moe.top_k} of each of "
            f"{moe.top_clusters} cluster(s) a token, rank {moe.rank}"
            + f", after {config.standard_steps} steps of standard experts"
            * bool(config.standard_steps),
            "standard": f"{moe.experts} standard experts, {moe.top_k} a token",
            "dense": f"dense, width {moe.dense_width}",
        }[moe.kind]
        return (
            f"{config.name}: {config.model.layers} layers of {config.model.hidden_size}, {experts}; "
            f"{self.process.ranks} rank(s): {self.shape}; ZeRO {config.world.zero_stage}, {config.train.precision}, "
            f"{len(self.data.train):,} tokens of {config.corpus.kind} text, {self.data.vocab_size} pieces"
        )


def _require_same_data(data: PreparedData, process: RankInfo) -> None:
    """Nodes without a shared file system prepare their own: another Python has another standard library."""
    digest = hashlib.sha256(f"{data.train.checksum} {data.validation.checksum}".encode()).digest()
    mine = torch.tensor([int.from_bytes(digest[:7], "big")], device=process.device)
    found = [torch.empty_like(mine) for _ in range(process.ranks)]
    dist.all_gather(found, mine)
    different = [rank for rank, other in enumerate(found) if not torch.equal(other, found[0])]
    if different:
        raise DataError(
            f"rank {', '.join(map(str, different))} prepared other tokens than rank 0: give all nodes the same text, "
            "or a shared corpus.cache_dir"
        )


def _stop_if_broken(step: int, outcome: StepOutcome) -> None:
    if outcome.broken_ranks:
        ranks = ", ".join(map(str, outcome.broken_ranks))
        raise TrainingError(
            f"step {step}: the loss of rank {ranks} is NaN or infinite; all ranks stop before the update. "
            "Lower optimizer.learning_rate, or look at the data of that step"
        )


def _stop_if_norm_broken(step: int, norm: float) -> None:
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {step}: the global gradient norm is {norm}, though the losses were finite; all ranks stop. Lower "
            "optimizer.learning_rate, or train in float32"
        )
