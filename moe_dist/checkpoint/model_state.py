"""A model and its optimizer's state as named, sharded tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_dist.checkpoint.manifest import WEIGHT
from moe_dist.checkpoint.parameter_names import NamedRun, named_runs
from moe_dist.checkpoint.sharded_tensor import OffloadedShard, Shard, ShardedTensor, State
from moe_dist.engine.optimizer_state import MASTER, STATE_NAMES, OptimizerState
from moe_dist.memory.block import TensorKind
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.model.language_model import LanguageModel


def weights_of(model: LanguageModel, state: OptimizerState | None = None) -> State:
    """Return the weights that the model computes with, as tensors that a checkpoint is read into.

    Args:
        state: optimizer state of a model under training, whose quantized factors are left out.
    """
    memory, tensors = model.context.memory, State()
    for parameter, runs in named_runs(model).items():
        if state is not None and state.is_packed(parameter):
            continue
        offloaded = memory is not None and memory.of(parameter) is not None
        for run in runs:
            shard: Shard | OffloadedShard = Shard(run.first, run_of(parameter, run))
            if memory is not None and offloaded:
                shard = _away(memory, parameter, run, TensorKind.WEIGHT)
            _add(tensors, _key(MASTER, run.name), run, parameter.dtype, [shard])
    return tensors


def training_tensors_of(model: LanguageModel, state: OptimizerState, names: tuple[str, ...] = STATE_NAMES) -> State:
    """Return this rank's shards of FP32 master weights and moments, or of frozen weights, as writable tensors."""
    tensors: State = {}
    memory = model.context.memory
    for parameter, runs in named_runs(model).items():
        if memory is not None and state.is_offloaded(parameter):
            for run in runs:
                for name in names:
                    shards = [_away(memory, parameter, run, memory.kind_of(name))]
                    _add(tensors, _key(name, run.name), run, torch.float32, shards)
            continue
        if not parameter.requires_grad:  # frozen: it has no state, and is its own master
            for run in runs if MASTER in names else ():
                _add(tensors, _key(MASTER, run.name), run, parameter.dtype, [Shard(run.first, run_of(parameter, run))])
            continue
        fragment = state.fragment(parameter)
        packed = state.value_of(parameter) if state.is_packed(parameter) else None
        for run in runs:
            for name in (name for name in state.names_of(parameter) if name in names):
                if packed is not None and name == MASTER:
                    _add(tensors, _key(name, run.name), run, torch.float32, [Shard(run.first, run_of(packed, run))])
                    continue
                owned = [] if fragment is None else _overlap(run, fragment.start, fragment.tensors[name])
                _add(tensors, _key(name, run.name), run, torch.float32, owned)
    return tensors


def store_packed(model: LanguageModel, state: OptimizerState, read: State) -> None:
    """Write quantized factors, which `training_tensors_of` gives as copies, after a checkpoint was read into them."""
    for parameter, runs in named_runs(model).items():
        if state.is_packed(parameter):
            for slot, run in enumerate(runs):
                value = read[_key(MASTER, run.name)].shards[0].values
                state.set_value(parameter, value.view(1, *run.shape), slot)


def _add(tensors: State, key: str, run: NamedRun, dtype: torch.dtype, shards: Sequence[Shard | OffloadedShard]) -> None:
    """Add a run's shards to its tensor."""
    tensor = tensors.setdefault(key, ShardedTensor(run.shape, dtype))
    tensor.shards = [*tensor.shards, *shards]


def _away(memory: ExpertMemory, parameter: nn.Parameter, run: NamedRun, kind: TensorKind) -> OffloadedShard:
    """Return a shard of an offloaded parameter, which is read and written through `ExpertMemory`."""
    found = memory.of(parameter)
    assert found is not None
    cluster, name = found
    length, dtype = run.length, cluster.sizes()[kind].dtype
    return OffloadedShard(
        0,
        length,
        dtype,
        lambda: memory.read_run(cluster, name, kind, run.start, length),
        lambda first, values: memory.write_run(cluster, name, kind, run.start + first, values),
    )


def _overlap(run: NamedRun, start: int, values: Tensor) -> list[Shard]:
    """Return the part of a run that is in elements [start, start + len(values)) of the flattened parameter."""
    first = max(run.start, start)
    last = min(run.start + run.length, start + values.numel())
    return [Shard(run.first + first - run.start, values[first - start : last - start])] if first < last else []


def run_of(parameter: Tensor, run: NamedRun) -> Tensor:
    """Return a view of a run of a parameter, one-dimensional."""
    return parameter.detach().view(-1)[run.start : run.start + run.length]


def _key(kind: str, name: str) -> str:
    return f"{WEIGHT if kind == MASTER else kind}/{name}"
