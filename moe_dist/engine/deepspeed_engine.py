"""Training steps on DeepSpeed: gradient accumulation, reduction by parameter class, clipping, ZeRO, AdamW, Muon."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor

from moe_dist.config import BatchShape, RunConfig
from moe_dist.distributed.init import RankInfo
from moe_dist.engine import gradient_norm
from moe_dist.engine.deepspeed_init import init_deepspeed
from moe_dist.engine.expert_process_groups import MarkedModel, register_groups
from moe_dist.engine.loss_scale import INITIAL, LossScale
from moe_dist.engine.muon import MatrixMuon
from moe_dist.engine.offloaded_adamw import OffloadedAdamW
from moe_dist.engine.optimizer import build_optimizer
from moe_dist.engine.optimizer_state import OptimizerState
from moe_dist.engine.packed_adamw import PackedAdamW
from moe_dist.engine.stage_passes import StageGroups, StageModel, StagePasses
from moe_dist.model.collective_bytes import Sent, add, step_bytes
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.teacher_loss import TeacherTargets
from moe_dist.moe.parameter_class import copies_of, numbers_by_class


@dataclass(frozen=True)
class StepOutcome:
    """Result of a step's forward and backward passes, before its update; the same on all ranks."""

    loss: float
    """Mean over all ranks and micro-batches, nats a token."""
    broken_ranks: tuple[int, ...]
    """Ranks whose own loss was NaN or infinite."""
    count_LE: Tensor
    """Copies routed to each expert of each layer, over all ranks; float64, on the CPU."""
    dropped: float
    """Copies dropped beyond the capacity, over all layers and ranks."""
    balance_loss: float
    """Weighted load-balancing loss (`moe.aux_loss_weight`) of all layers; not included in `loss`."""
    z_loss: float
    """Weighted router z-loss (`moe.z_loss_weight`) of all layers; not included in `loss`."""
    stop: bool
    """True if any rank was asked to stop the run after this step."""
    idle: float = 0.0
    """Share of the passes' time in which pipeline stages computed nothing, mean over ranks; 0 for one stage."""
    total_2K: Tensor | None = None
    """Sums of losses, nats, and of targets of each source of a blend."""
    teacher_divergence: float | None = None
    """KL divergence from the teacher at `distill.temperature`, nats a token; not in `loss`. None: no teacher."""


class DeepSpeedEngine:
    """Language model with its optimizer and DeepSpeed engine.

    Attributes:
        routers_only: True if updates change routers alone; other weights keep their bits, their moments do not.
    """

    routers_only = False

    def __init__(
        self,
        model: LanguageModel,
        config: RunConfig,
        batch: BatchShape,
        process: RankInfo,
        loss_scale: LossScale | None = None,
    ) -> None:
        """Create optimizer and engine.

        Args:
            loss_scale: loss scale of an earlier engine to continue; None: a new one.
        """
        init_deepspeed()
        self.loss_scale = loss_scale or LossScale(config.train.precision == "float16")
        self.model, self.config, self.batch, self.process = model.to_device(process.device), config, batch, process
        mesh = model.context.mesh
        register_groups(model, mesh)
        memory, options = model.context.memory, config.optimizer
        self._memory = memory
        self._offloaded = None if memory is None else OffloadedAdamW(memory, options, mesh, config.memory.lazy_updates)
        self._packed = PackedAdamW(model, config) if config.precision.residuals == "packed" else None
        self._muon = MatrixMuon(model, config, mesh) if options.kind == "muon" else None
        self._ours = self._offloaded or self._packed or self._muon  # a configuration has one of them at most
        hidden = () if self._ours is None else self._ours.parameters()
        several = mesh.shape.pipeline > 1
        marked = MarkedModel(StageModel(model) if several else model, config.moe.experts, hidden)
        groups.mpu = StageGroups(mesh) if several else None  # DeepSpeed would keep that of an earlier engine
        self._engine, *_ = deepspeed.initialize(
            model=marked,
            optimizer=build_optimizer(marked, options),
            mpu=groups.mpu,
            config=_deepspeed_config(config, batch, mesh.shape.stage_ranks),
            dist_init_required=False,
        )
        self._stages = StagePasses(self._engine, self.model) if several else None
        self.training_state().undo_trial_step()
        elsewhere = gradient_norm.nothing_else if self._ours is None else self._ours.finish_gradients
        gradient_norm.install(self._engine, lambda parameter: copies_of(parameter, mesh), options.clip_norm, elsewhere)

    def forward_backward(
        self,
        sequences_BS: Tensor,
        stop_wanted: Callable[[], bool] = lambda: False,
        source_B: Tensor | None = None,
        sources: int = 0,
        teach: Callable[[int, Tensor], TeacherTargets] | None = None,
    ) -> StepOutcome:
        """Run the forward and backward passes of a step, in micro-batches; collective.

        Args:
            sequences_BS: this rank's share of the batch, [micro * accumulation, S+1] token ids.
            stop_wanted: returns True if this rank was asked to stop after the step; called once, at the end.
            source_B: number of the source of each sequence, below `sources`; None: losses by source are not wanted.
            teach: returns a teacher's predictions for a micro-batch and the number of its first sequence; None: none.
        """
        self.model.sequence_losses.clear()
        loss = self._passes(sequences_BS.to(self.process.device).split(self.batch.micro), teach)
        total_2K = self._losses_by_source(sequences_BS, source_B, sources)
        return self._reduce_outcome(loss, total_2K, stop_wanted())

    def _passes(self, micro_batches: Sequence[Tensor], teach: Callable[[int, Tensor], TeacherTargets] | None) -> Tensor:
        """Run the forward and backward passes of a step; return this rank's mean loss."""
        if self.loss_scale.enabled:
            self._engine.optimizer.loss_scale = self.model.context.balance.loss_scale = self.loss_scale.scale
        # the ranks of a tensor group compute one loss together, and gradients are divided by all ranks
        scale = self._missing_scale * self.model.context.mesh.shape.tensor
        if self._stages is not None:
            return self._stages.run(micro_batches, scale, self._applied_scale)
        loss = torch.zeros((), device=self.process.device)
        for number, sequence_BS in enumerate(micro_batches):
            self.model.teacher = None if teach is None else teach(number * self.batch.micro, sequence_BS)
            if self._memory is not None:
                self._memory.last_pass = self._engine.is_gradient_accumulation_boundary()
            micro_loss = self._engine(sequence_BS)
            self._engine.backward(scale * micro_loss)
            loss += micro_loss.detach().float() / self.batch.accumulation
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()
        self.model.teacher = None
        return loss

    def _losses_by_source(self, sequences_BS: Tensor, source_B: Tensor | None, sources: int) -> Tensor:
        """Return the sums of losses and of targets of each source on this rank, float64 [2, K]."""
        total_2K = torch.zeros(2, sources, dtype=torch.float64, device=self.process.device)
        if source_B is not None and sources and self.model.stage.last:  # other stages have no losses
            losses_B = torch.cat(self.model.sequence_losses)
            targets_B = (sequences_BS[:, 1:] >= 0).sum(1).to(losses_B) / self.model.context.mesh.shape.context
            total_2K.index_add_(1, source_B.to(losses_B.device), torch.stack([losses_B, targets_B]))
        return total_2K

    def update(self, outcome: StepOutcome, learning_rate: float) -> float:
        """Clip gradients, update weights and balance biases; return the global gradient norm before clipping.

        If gradients overflow float16 on any rank, all ranks skip the update: weights, moments, their step count and
        biases stay as they are, only the loss scale changes, and the norm is infinite.

        Raises:
            TrainingError: gradients overflow at the smallest loss scale.
        """
        for group in self._engine.optimizer.param_groups:
            kept = self.routers_only and not group["router"]
            group["lr"] = 0.0 if kept else learning_rate * group["lr_scale"]
        self._engine.step()
        overflow = self.loss_scale.enabled and bool(self._engine.optimizer.overflow)
        self.loss_scale.update(overflow)
        if overflow:
            if self._ours is not None:
                self._ours.discard_gradients()
            return math.inf
        if self._ours is not None and self.routers_only:
            self._ours.discard_gradients()
        elif self._ours is not None:
            norm = torch.as_tensor(self._engine.optimizer._global_grad_norm)
            factor = gradient_norm.clip_factor(self._engine.optimizer, norm, self.config.optimizer.clip_norm)
            self._ours.step(learning_rate, factor)
        if self.config.moe.layer_kind.routed:
            self.model.context.balance.update(self._count_LE, self.model.context.placements)
        return float(self._engine.optimizer._global_grad_norm)

    @property
    def _missing_scale(self) -> float:
        """Factor of the loss that DeepSpeed omits: without ZeRO its engine does not apply the loss scale."""
        return 1.0 if isinstance(self._engine.optimizer, DeepSpeedZeroOptimizer) else self.loss_scale.scale

    @property
    def _applied_scale(self) -> float:
        """Factor by which DeepSpeed multiplies each loss before its backward pass."""
        return self.loss_scale.scale / self._missing_scale if self.loss_scale.enabled else 1.0

    def training_state(self) -> OptimizerState:
        """Return the master weights and moments of the parameters; to be used between two steps only."""
        return OptimizerState(self._engine.optimizer, self._offloaded, self._packed, self._muon)

    def collective_bytes(self) -> dict[str, Sent]:
        """Return the bytes that this rank sends in a step to each other rank beside the dispatch, by purpose."""
        muon, mesh = self._muon, self.model.context.mesh
        held = numbers_by_class(one for one in self.model.parameters() if muon is None or one not in muon)
        sent = step_bytes(self.config, mesh, self.batch, self.model.vocab_size, held)
        if muon is not None:
            add(sent["reduction"], muon.sent())
        return sent

    def wrap_reduction(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace the function that reduces gradients by `wrap` of it; for measurements."""
        self._engine.allreduce_gradients = wrap(self._engine.allreduce_gradients)

    def close(self) -> None:
        """Release the optimizer and DeepSpeed's hooks; the engine cannot be used afterwards."""
        self._engine.destroy()
        self._stages = None
        del self._engine, self.model

    def _reduce_outcome(self, loss: Tensor, mine_2K: Tensor, stop_wanted: bool) -> StepOutcome:
        """Sum loads, losses, non-finite losses and stop requests over the ranks, in one small all-reduce per step."""
        balance, ranks = self.model.context.balance, self.process.ranks
        per_stage = self.model.context.mesh.shape.stage_ranks
        faults = torch.zeros(ranks, dtype=torch.float64, device=loss.device)
        faults[self.process.rank] = (~loss.isfinite()).double()
        stop = torch.tensor(float(stop_wanted), dtype=torch.float64, device=loss.device)
        idle = stop.new_tensor(self._stages.idle if self._stages is not None else 0.0)
        taught_2, self.model.taught_2 = self.model.taught_2, None
        of_text, divergence = (loss, torch.zeros_like(loss)) if taught_2 is None else taught_2
        losses = [each.double().nan_to_num(0, 0, 0) for each in (of_text, divergence)]
        mine = torch.stack([*losses, balance.dropped_L.sum().double(), stop, idle])
        mine = torch.cat([mine, balance.router_loss_2.double()])
        packed = torch.cat([mine, mine_2K.flatten().nan_to_num(0, 0, 0), faults, balance.count_LE.flatten().double()])
        dist.all_reduce(packed)
        balance.clear_counts()
        self._count_LE = packed[-balance.count_LE.numel() :].view(balance.count_LE.shape)
        sums, totals, faults, counts = packed.cpu().split([len(mine), mine_2K.numel(), ranks, balance.count_LE.numel()])
        broken = tuple(faults.nonzero().flatten().tolist())
        count_LE = counts.view(balance.count_LE.shape)
        loss_sum, divergence_sum, dropped, stops, idle_sum, balance_loss, z_loss = sums.tolist()
        means = (loss_sum / per_stage, balance_loss / per_stage, z_loss / per_stage)
        return StepOutcome(
            means[0],
            broken,
            count_LE,
            dropped,
            *means[1:],
            stops > 0,
            idle=idle_sum / ranks,
            total_2K=totals.view(2, -1) if len(totals) else None,
            teacher_divergence=None if taught_2 is None else divergence_sum / per_stage,
        )


def _deepspeed_config(config: RunConfig, batch: BatchShape, ranks: int) -> dict[str, Any]:
    return {
        "train_batch_size": batch.micro * batch.accumulation * ranks,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": config.train.precision == "bfloat16"},
        "fp16": {"enabled": config.train.precision == "float16", "loss_scale": INITIAL},  # `LossScale` changes it
        "zero_optimization": {
            "stage": config.world.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
