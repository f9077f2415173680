"""A small model around MoE layers of any integration, and the plain torch loop in one process that they must equal."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist import ClusteredMoE, MoEConfig, update_load_balance
from moe_dist.benchmarks.baselines import on_cpu

WIDTH, BATCH, LENGTH, STEPS, CLIP, RATE = 8, 8, 3, 3, 0.05, 0.5
MOE = MoEConfig(
    experts=8,
    clusters=4,
    top_k=2,
    expert_hidden=8,
    rank=2,
    wire_dtype="float32",
    backend="masked",
    balance_rate=0.1,
)


class OnCpu(on_cpu.OnCpu):
    """The same, and CUDA's current device is the CPU."""

    STAND_INS: ClassVar[dict[str, Any]] = {"current_device": lambda: "cpu", "synchronize": lambda *_: None}

    def __enter__(self) -> Any:
        self.cuda = mock.patch.multiple(torch.cuda, **self.STAND_INS)
        self.cuda.start()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.cuda.stop()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


class SmallModel(nn.Module):
    """Linear layer and two residual MoE layers; [B, S, D] -> [B, S, D]."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        """Args: make: returns the MoE layer of a seed; an output that is a tuple has the hidden states first."""
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(make(seed) for seed in range(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return the output; the layers get [S, B, D]."""
        h: Tensor = self.embed(x_BSD).transpose(0, 1)
        for layer in self.layers:
            y = layer(h)
            h = h + (y[0] if isinstance(y, tuple) else y)
        return h.transpose(0, 1).contiguous()  # FSDP2 warns about views


def loss_of(model: Callable[[Tensor], Tensor], step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """Loss of this rank's share of a step's batch."""
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(step))
    mine = x[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
    return (model(mine) - mine.roll(1, dims=1)).square().mean()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """This rank's weights and biases by names that are the same on any mesh; those of DTensors are gathered."""
    found: dict[str, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, ClusteredMoE)]
    for number, layer in enumerate(layers):
        here = layer.placement.clusters_of_block(layer.context.mesh.at.cluster)
        for cluster, part in zip(here, layer.clusters, strict=True):
            for name, value in part.named_parameters():
                found[f"{number}.{cluster}.{name}"] = whole(value)
        found[f"{number}.router"] = whole(layer.router.weight_ED)
        found[f"{number}.bias"] = layer.balance.expert_bias_LE.clone()
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return found | {f"dense.{i}": whole(parameter) for i, parameter in enumerate(outside)}


def whole(value: Any) -> Tensor:
    """A copy of a tensor, gathered if it is distributed."""
    value = value.detach()
    tensor: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return tensor.clone()


def plain_training(clip: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of SGD steps in one process; so that weights show gradients, without Adam's scale."""
    model = SmallModel(lambda seed: ClusteredMoE(WIDTH, MOE, seed=seed, init_std=0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, step)
        loss.backward()
        if clip:
            assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > 2 * CLIP
        optimizer.step()
        optimizer.zero_grad()
        update_load_balance(model)
        losses.append(loss.item())
    return losses, weights_of(model)


def assert_trained_alike(found: tuple[list[float], dict[str, Tensor]], expected: Any, what: str) -> None:
    """Compare the losses and weights of a rank with those of one process."""
    losses, weights = expected
    torch.testing.assert_close(
        torch.tensor(found[0]), torch.tensor(losses), rtol=1e-5, atol=1e-6, msg=lambda m: what + m
    )
    assert found[1]
    for name, value in found[1].items():
        text = f"{what}, {name}: "
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=2e-6, msg=text.__add__)


def losses_of_example(name: str) -> list[float]:
    """Losses that a script of docs/examples leaves in `losses`; it finds its ranks' process group already there."""
    script = Path(__file__).resolve().parents[2] / "docs" / "examples" / name
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        losses: list[float] = runpy.run_path(str(script))["losses"]
    return losses
