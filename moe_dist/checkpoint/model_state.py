"""A model and its optimizer's state as named, sharded tensors."""

import torch
from torch import Tensor, nn

from moe_dist.checkpoint.manifest import WEIGHT
from moe_dist.checkpoint.names import NamedRun, named_runs
from moe_dist.checkpoint.shards import Shard, ShardedTensor, State
from moe_dist.engine.training_state import MASTER, STATE_NAMES, TrainingState
from moe_dist.model.language_model import LanguageModel


def weights_of(model: LanguageModel) -> State:
    """The weights that the model computes with, whole and free to be written: what a checkpoint is read into."""
    return {
        _key(MASTER, run.name): ShardedTensor(run.shape, parameter.dtype, [Shard(0, _run_of(parameter, run))])
        for parameter, runs in named_runs(model).items()
        for run in runs
    }


def training_tensors_of(model: LanguageModel, state: TrainingState, names: tuple[str, ...] = STATE_NAMES) -> State:
    """What this rank owns of FP32 masters and moments, free to be written."""
    tensors: State = {}
    for parameter, runs in named_runs(model).items():
        fragment = state.fragment(parameter)
        for run in runs:
            for name in names:
                tensor = tensors[_key(name, run.name)] = ShardedTensor(run.shape, torch.float32)
                if fragment is not None:
                    tensor.shards += _overlap(run, fragment.start, fragment.tensors[name])
    return tensors


def _overlap(run: NamedRun, start: int, values: Tensor) -> list[Shard]:
    """The part of a run that lies in elements [start, start + len(values)) of the flattened parameter."""
    first = max(run.start, start)
    last = min(run.start + torch.Size(run.shape).numel(), start + values.numel())
    return [Shard(first - run.start, values[first - start : last - start])] if first < last else []


def _run_of(parameter: nn.Parameter, run: NamedRun) -> Tensor:
    return parameter.detach().view(-1)[run.start : run.start + torch.Size(run.shape).numel()]


def _key(kind: str, name: str) -> str:
    return f"{WEIGHT if kind == MASTER else kind}/{name}"
