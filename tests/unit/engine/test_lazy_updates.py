"""Deferred updates are torch's own, made later: any order of gradients and uses ends at the same bits."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_dist.config import OptimizerConfig, load_config
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine import offloaded_adamw
from moe_dist.engine.offloaded_adamw import OffloadedAdamW
from moe_dist.engine.optimizer import update_rule
from moe_dist.memory.block import TensorKind
from moe_dist.memory.expert_memory import ExpertMemory
from moe_dist.moe.parameter_class import ParameterClass, mark

CPU = torch.device("cpu")
CLUSTERS = 3
SHAPES = {"w_in_DH": (4, 12), "in_u_NDR": (2, 8, 3), "hidden_gate_NF": (2, 8)}
"""Three rules of update: a full matrix, a factor, and a vector without weight decay.

Sizes are multiples of 16, as blocks are padded to: torch's kernel rounds the last elements of other sizes otherwise.
"""
KINDS = (TensorKind.WEIGHT, TensorKind.EXP_AVG, TensorKind.EXP_AVG_SQ)

steps = st.lists(
    st.tuples(
        st.sets(st.integers(0, CLUSTERS - 1)),  # clusters with tokens
        st.floats(0, 1, width=32),  # learning rate
        st.none() | st.integers(0, CLUSTERS - 1),  # cluster that is used otherwise after the step
    ),
    min_size=1,
    max_size=12,
)


def _values(seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=drawn) for name, shape in SHAPES.items()}


@given(steps, st.sampled_from([16, 32, 2**15]))
def test_any_schedule_ends_at_the_bits_of_torch(schedule: list[tuple[set[int], float, int | None]], chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before, offloaded_adamw.CHUNK = offloaded_adamw.CHUNK, chunk
        try:
            _check(schedule, Path(folder))
        finally:
            offloaded_adamw.CHUNK = before


def _check(schedule: list[tuple[set[int], float, int | None]], folder: Path) -> None:
    words = ["model.layers=1", "memory.offload=true", f"memory.directory={folder}/memory", "train.precision=float32"]
    config = load_config(None, [*words, "optimizer.weight_decay=0.2", "optimizer.feed_forward_lr_scale=0.5"])
    memory, options = ExpertMemory(config, CLUSTERS, 0, CPU), config.optimizer
    expected: list[dict[str, nn.Parameter]] = []
    for local in range(CLUSTERS):
        made = {name: nn.Parameter(value) for name, value in _values(local).items()}
        expected.append({name: nn.Parameter(parameter.detach().clone()) for name, parameter in made.items()})
        mark(nn.ParameterList(made.values()), ParameterClass.EXPERT)
        memory.adopt(0, local, made)
    adam, lazy = _torch(expected, options), OffloadedAdamW(memory, options, Mesh.alone())
    for number, (active, rate, used) in enumerate(schedule):
        for local, cluster in enumerate(memory.clusters.values()):
            gradients = _values(100 * number + local) if local in active else {}
            for name, parameter in expected[local].items():
                parameter.grad = gradients.get(name, torch.zeros(SHAPES[name])).clone()
            if gradients:
                with memory.device.pinned(cluster.block(TensorKind.GRADIENT), changed=True, zero_init=True) as flat:
                    for name, view in cluster.layout.views(flat).items():
                        view.copy_(gradients[name])
                cluster.has_gradient = True
        norm = torch.cat([p.grad.flatten() for own in expected for p in own.values() if p.grad is not None]).norm()
        assert torch.allclose(lazy.finish_gradients().sqrt().float(), norm)
        for group in adam.param_groups:
            group["lr"] = rate * group["scale"]
        adam.step()
        lazy.step(rate, None)
        assert [cluster.behind > 0 for cluster in memory.clusters.values()] == [
            local not in active for local in range(CLUSTERS)
        ]
        if used is not None:
            cluster = memory.clusters[0, used]
            with cluster.weights():
                assert all(torch.equal(cluster.parameters[name], own) for name, own in expected[used].items())
    for local, cluster in enumerate(memory.clusters.values()):
        for name, parameter in expected[local].items():
            state = adam.state[parameter]
            for kind, value in zip(KINDS, (parameter, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                found = memory.read_run(cluster, name, kind, 0, parameter.numel()).view_as(parameter)
                assert torch.equal(found, value), f"{kind} of {name}"
    memory.close()


def _torch(clusters: list[dict[str, nn.Parameter]], options: OptimizerConfig) -> torch.optim.AdamW:
    groups = []
    for own in clusters:
        for name, parameter in own.items():
            rule = update_rule(name, parameter, options)
            groups.append({"params": [parameter], "weight_decay": rule.weight_decay, "scale": rule.lr_scale})
    return torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), eps=options.epsilon, fused=True)
