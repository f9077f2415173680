"""Eight bits a number: the rounding against its definition, for any vector."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.dispatch.traffic_model import vector_bytes
from moe_dist.dispatch.wire_format import pack, unpack

VALUES = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@given(st.lists(VALUES, min_size=1, max_size=9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_number_is_at_most_half_a_step_off(values: list[float], dtype: torch.dtype) -> None:
    x_1D = torch.tensor([values]).to(dtype)
    packed = pack(x_1D)
    assert packed.dtype == torch.int8
    assert packed.numel() == vector_bytes(len(values), "int8")
    back = unpack(packed, dtype)
    assert back.dtype == dtype
    largest = x_1D.abs().max().item()
    slack = largest * (1e-6 if dtype is torch.float32 else 2**-8)
    assert (back.double() - x_1D.double()).abs().max().item() <= largest / 254 + slack + 1e-38
    torch.testing.assert_close(back.abs().max(), x_1D.abs().max(), rtol=2**-7, atol=1e-36)


def test_rows_are_rounded_each_by_itself() -> None:
    x_RD = torch.randn(5, 16) * torch.tensor([1e-6, 1.0, 1e6, 3.0, 0.0])[:, None]
    each = torch.cat([unpack(pack(row[None]), torch.float32) for row in x_RD])
    assert torch.equal(unpack(pack(x_RD), torch.float32), each)
    assert torch.equal(each[4], torch.zeros(16))
    assert unpack(pack(torch.empty(0, 16)), torch.float32).shape == (0, 16)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_as_nan(bad: float) -> None:
    x_RD: Tensor = torch.randn(2, 4)
    x_RD[1, 2] = bad
    back = unpack(pack(x_RD), torch.float32)
    assert back[0].isfinite().all()
    assert back[1].isnan().all()
