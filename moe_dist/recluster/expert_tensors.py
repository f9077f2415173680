"""Tensors of clustered experts for migration: weights and training state, by layer, cluster and name."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.mesh import Coordinates, Mesh, coordinates_of, rank_at
from moe_dist.engine.optimizer_state import OptimizerState
from moe_dist.memory.block import TensorKind as BlockKind
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.memory.offloaded_cluster import OffloadedCluster
from moe_dist.moe.clustered_experts import ClusteredExperts
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.parameter_class import ParameterClass, class_of
from moe_dist.recluster.migration_plan import Holdings, PieceKind, Run, TensorKey

NOTHING: Run = (0, 0)


class ExpertTensors:
    """This rank's expert tensors, which are read and written in place, and the ownership of their runs by all ranks."""

    def __init__(self, layers: list[ClusteredMoE], state: OptimizerState, mesh: Mesh) -> None:
        """Gather the runs of the training state that each rank owns; collective."""
        self._parameters = dict(_parameters_of(layers))
        self._state, self._mesh = state, mesh
        # without separate masters the weight is its own master and is sent once
        self.kinds = tuple(
            kind for kind in PieceKind if kind is not PieceKind.MASTER or state.separate_masters_of_experts
        )
        self.holdings = self._gather_holdings()

    def read(self, key: TensorKey, start: int, length: int) -> Tensor:
        """Return a copy of a run of elements that this rank owns; offloaded tensors are read from their tier."""
        if (offloaded := self._offloaded(key)) is not None:
            memory, cluster, name = offloaded
            return memory.read_run(cluster, name, BlockKind(key.kind.value), start, length)
        if self._is_packed(key):
            flat = self._state.value_of(self._parameters[key.layer, key.local, key.name]).view(-1)
            return flat[start : start + length].clone()
        tensor, first = self.owned(key)
        return tensor[start - first : start - first + length].to(self.dtype(key), copy=True)

    def write(self, key: TensorKey, start: int, values: Tensor) -> None:
        """Overwrite a run of elements that this rank owns."""
        if (offloaded := self._offloaded(key)) is not None:
            memory, cluster, name = offloaded
            memory.write_run(cluster, name, BlockKind(key.kind.value), start, values)
            return
        if self._is_packed(key):  # whole experts: each replica owns all codes
            parameter = self._parameters[key.layer, key.local, key.name]
            width = parameter[0].numel()
            self._state.set_value(parameter, values.view(-1, *parameter.shape[1:]), start // width)
            return
        tensor, first = self.owned(key)
        tensor[start - first : start - first + len(values)].copy_(values)

    def dtype(self, key: TensorKey) -> torch.dtype:
        """Return the dtype of a tensor's elements."""
        return self._dtype(key.kind)

    def _offloaded(self, key: TensorKey) -> tuple[ExpertMemory, OffloadedCluster, str] | None:
        if self._state.offloaded is None:
            return None
        memory = self._state.offloaded.memory
        found = memory.of(self._parameters[key.layer, key.local, key.name])
        return None if found is None else (memory, *found)

    def _has(self, parameter: nn.Parameter, kind: PieceKind) -> bool:
        """Return True if a parameter has state of this kind, beside its weight."""
        if kind is PieceKind.MASTER and not self._state.is_offloaded(parameter):
            return self._state.has_separate_master(parameter)
        return kind.value in self._state.names_of(parameter)

    def _is_packed(self, key: TensorKey) -> bool:
        return key.kind is PieceKind.WEIGHT and self._state.is_packed(self._parameters[key.layer, key.local, key.name])

    def owned(self, key: TensorKey) -> tuple[Tensor, int]:
        """Return a one-dimensional view of this rank's run of a tensor, and the index of its first element."""
        parameter = self._parameters[key.layer, key.local, key.name]
        if key.kind is PieceKind.WEIGHT:
            return parameter.detach().view(-1), 0
        fragment = self._state.fragment(parameter)
        if fragment is None:
            return parameter.new_empty(0, dtype=torch.float32), 0
        return fragment.tensors[key.kind.value], fragment.start

    def _gather_holdings(self) -> Holdings:
        tables = self._gather_runs()
        widths: dict[bool, dict[str, int]] = {False: {}, True: {}}
        runs: dict[bool, dict[TensorKey, tuple[Run, ...]]] = {False: {}, True: {}}
        for row, ((layer, local, name), parameter) in enumerate(self._parameters.items()):
            shared = class_of(parameter) is ParameterClass.BASE
            widths[shared][name] = parameter.numel() if shared else parameter[0].numel()
            owned = tuple(tables[rank][row] for rank in self._replicas(shared))
            for kind in self.kinds:
                whole = ((0, parameter.numel()),) * len(owned)
                found = whole if kind is PieceKind.WEIGHT else owned
                if kind is not PieceKind.WEIGHT and not self._has(parameter, kind):
                    found = (NOTHING,) * len(owned)
                runs[shared][TensorKey(layer, local, name, kind)] = found
        itemsize = {kind: self._dtype(kind).itemsize for kind in self.kinds}
        return Holdings(widths[False], widths[True], itemsize, runs[False], runs[True], self._mesh.stage)

    def _gather_runs(self) -> list[list[Run]]:
        """Gather the run of each parameter's state that each rank owns.

        Raises:
            RuntimeError: the runs differ between blocks, which migration does not support.
        """
        mine = torch.tensor([self._state_run(p) for p in self._parameters.values()], device=self._device)
        shape = self._mesh.shape
        found = [torch.empty_like(mine) for _ in range(shape.stage_ranks)]
        dist.all_gather(found, mine, group=self._mesh.stage_group)
        for rank, table in enumerate(found):
            at = coordinates_of(shape, rank)
            twin = rank_at(shape, Coordinates(at.data, self._mesh.at.cluster, at.shard))
            if not torch.equal(table, found[twin]):
                raise RuntimeError(f"rank {rank} owns different runs of its experts' training state than rank {twin}")
        return [[(int(first), int(end)) for first, end in table] for table in found]

    def _replicas(self, shared: bool) -> Iterator[int]:
        """Yield the ranks of this block's replicas, in the order of `Holdings`.

        Args:
            shared: True for a base, replicated over data and shard; False for residuals, replicated over data.
        """
        shape, at = self._mesh.shape, self._mesh.at
        for data in range(shape.data):
            for shard in range(shape.shard) if shared else (at.shard,):
                yield rank_at(shape, Coordinates(data, at.cluster, shard))

    def _state_run(self, parameter: nn.Parameter) -> Run:
        if self._state.is_offloaded(parameter):
            return 0, parameter.numel()
        fragment = self._state.fragment(parameter)
        return NOTHING if fragment is None else (fragment.start, fragment.end)

    def _dtype(self, kind: PieceKind) -> torch.dtype:
        """Return the type in which elements are sent: dequantized factors need float32."""
        if kind is not PieceKind.WEIGHT or any(map(self._state.is_packed, self._parameters.values())):
            return torch.float32
        return next(iter(self._parameters.values())).dtype

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device


def _parameters_of(layers: list[ClusteredMoE]) -> Iterator[tuple[tuple[int, int, str], nn.Parameter]]:
    for layer in layers:
        for local, cluster in enumerate(layer.clusters):
            assert isinstance(cluster, ClusteredExperts)
            for name, parameter in cluster.named_parameters():
                yield (layer.layer, local, name), parameter
