"""A cluster as it is stored: training sees the same numbers, bit by bit, in every form of the computation."""

import shutil
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from moe_dist.compression import (
    ClusterWeights,
    GroupFormat,
    QuantizedCluster,
    QuantizedExperts,
    StorageFormat,
    fake_quantize,
    long_axis,
)
from moe_dist.kernels import clustered_experts
from tests.unit.kernels.test_shared_base_experts import needs_interpreter

FORMS = [
    "masked",
    "sorted",
    "reference",
    pytest.param("triton", marks=needs_interpreter),
    pytest.param("cpu", marks=pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")),
]
STORED = [
    StorageFormat(GroupFormat(), torch.bfloat16),
    StorageFormat(GroupFormat(symmetric=False, group_size=32, scale_dtype=torch.float16), torch.float16),
    StorageFormat(GroupFormat(bits=8, group_size=128), torch.float32),
]


def drawn(dtype: torch.dtype, vectors: bool = True) -> ClusterWeights:
    """Four experts, d = 40, f = 48, r = 4: no group divides anything."""
    torch.manual_seed(0)
    shapes = [(40, 96), (48, 40), (4, 40, 8), (4, 2, 4, 48), (4, 48, 4), (4, 4, 40)]
    shapes += [(4, 48), (4, 96), (4, 40)] if vectors else []
    return ClusterWeights(*((0.2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes))


def tensors(weights: ClusterWeights) -> dict[str, Tensor]:
    return {f.name: getattr(weights, f.name) for f in fields(weights) if getattr(weights, f.name) is not None}


def outputs(weights: ClusterWeights, dtype: torch.dtype, form: str) -> Tensor:
    torch.manual_seed(1)
    slot = torch.rand(30, 4).argsort(1)[:, :2]
    return clustered_experts(torch.randn(30, 40).to(dtype), slot, torch.rand(30, 2), weights, form)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [True, False])
def test_training_sees_what_is_stored_bit_by_bit(stored: StorageFormat, dtype: torch.dtype, vectors: bool) -> None:
    weights = drawn(dtype, vectors)
    seen, packed = tensors(fake_quantize(weights, stored)), QuantizedCluster.of(weights, stored)
    again = packed.experts.with_bytes(packed.experts.to_bytes())
    kept = tensors(QuantizedCluster(packed.base_in_DH, packed.base_out_FD, again).weights(dtype))
    assert seen.keys() == kept.keys() == tensors(weights).keys()
    for name, value in seen.items():
        assert value.dtype == dtype, name
        assert torch.equal(value, kept[name]), name
        factor = long_axis(name) is not None
        assert torch.equal(value, getattr(weights, name)) is not factor or name.startswith("base_"), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_computes_the_same_bits_of_both(form: str, dtype: torch.dtype) -> None:
    weights, stored = drawn(dtype), STORED[0]
    seen = outputs(fake_quantize(weights, stored), dtype, form)
    kept = outputs(QuantizedCluster.of(weights, stored).weights(dtype), dtype, form)
    assert torch.equal(seen, kept)
    assert not torch.equal(seen, outputs(weights, dtype, form))


def test_gradients_go_straight_through() -> None:
    weights, stored = drawn(torch.float32), STORED[1]
    leaves = tensors(QuantizedCluster.of(weights, stored).weights(torch.float32))
    kept = ClusterWeights(**{name: value.detach().requires_grad_() for name, value in leaves.items()})
    found = torch.autograd.grad(
        outputs(fake_quantize(weights, stored), torch.float32, "sorted").sum(), list(vars(weights).values())
    )
    expected = torch.autograd.grad(outputs(kept, torch.float32, "sorted").sum(), list(vars(kept).values()))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_experts_travel_as_rows_of_bytes(stored: StorageFormat) -> None:
    packed = QuantizedCluster.of(drawn(torch.bfloat16), stored).experts
    rows = packed.to_bytes()
    assert rows.dtype == torch.uint8
    assert rows.numel() == packed.nbytes
    swapped = packed.with_bytes(rows[[1, 0, 2, 3]]).parts()
    for name, part in packed.parts().items():
        assert torch.equal(swapped[name], part[[1, 0, 2, 3]]), name
    built = QuantizedExperts.of(
        {name: value.to("meta") for name, value in own(drawn(torch.bfloat16)).items()}, stored.factors
    )
    assert all(map(torch.equal, built.with_bytes(rows).parts().values(), packed.parts().values()))
    for wrong in (rows[:, 1:], rows[:3], rows.char()):
        with pytest.raises(ValueError, match=r"4 packed experts are torch\.uint8"):
            packed.with_bytes(wrong)


def own(weights: ClusterWeights) -> dict[str, Tensor]:
    return {name: value for name, value in tensors(weights).items() if not name.startswith("base_")}


def test_four_bits_take_little_more_than_a_quarter_of_sixteen() -> None:
    """At widths that groups of 64 divide: 4 bits a number and 16 a group."""
    shapes = [(128, 512), (256, 128), (4, 128, 8), (4, 2, 4, 256), (4, 256, 4), (4, 4, 128)]
    weights = ClusterWeights(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes))
    plain = sum(value.nbytes for value in own(weights).values())
    packed = QuantizedCluster.of(weights, STORED[0])
    assert packed.experts.nbytes == plain * (4 + 16 / 64) / 16
    assert packed.nbytes == packed.experts.nbytes + 2 * (128 * 512 + 256 * 128)
