"""Factors in few bits: within half a step of what they were, each group by itself, the same for every way of asking."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.compression import GroupFormat, QuantizedFactor
from moe_dist.compression.stochastic_rounding import noise_key

formats = st.builds(
    GroupFormat,
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)


def drawn(seed: int, shape: tuple[int, ...], magnitude: float, shift: float) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return magnitude * (values + shift)


def step_of(packed: QuantizedFactor) -> Tensor:
    """The scale of each number, in the factor's shape."""
    length = packed.shape[packed.axis]
    scale = packed.scales_XG.float().repeat_interleave(packed.format.group_size, dim=-1)
    return scale[..., :length].movedim(-1, packed.axis)


def reference(value_L: Tensor, form: GroupFormat) -> Tensor:
    """One component, group by group, number by number, in float64."""
    low, high, found = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1, []
    for group in value_L.split(form.group_size):
        least, most = min(0.0, group.min().item()), max(0.0, group.max().item())
        exact = max(least / low, most / high) if form.symmetric else (most - least) / (high - low)
        exact = max(exact, torch.finfo(form.scale_dtype).smallest_normal)
        scale = torch.tensor(exact, dtype=torch.float64).to(form.scale_dtype)
        if scale.double() < exact:
            scale = torch.nextafter(scale, torch.tensor(torch.inf, dtype=form.scale_dtype))
        zero = 0 if form.symmetric else low - round(least / exact)
        codes = [min(high, max(low, round(x / scale.item()) + zero)) for x in group.tolist()]
        found += [(code - zero) * scale.item() for code in codes]
    return torch.tensor(found)


@settings(max_examples=60)
@given(
    form=formats,
    seed=st.integers(0, 2**31),
    length=st.integers(1, 300),
    others=st.integers(1, 5),
    axis=st.sampled_from([-1, -2]),
    magnitude=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
)
def test_every_number_is_within_half_a_step(
    form: GroupFormat, seed: int, length: int, others: int, axis: int, magnitude: float, shift: float
) -> None:
    shape = (2, others, length) if axis == -1 else (2, length, others)
    value = drawn(seed, shape, magnitude, shift)
    packed = QuantizedFactor.of(value, axis, form)
    found = packed.unpacked(torch.float32)
    assert found.shape == value.shape
    assert ((found - value).abs() <= 0.50001 * step_of(packed)).all()
    assert found.sign().mul(value.sign()).min() >= 0  # zero is a number of every group


@settings(max_examples=30)
@given(form=formats, seed=st.integers(0, 2**31), length=st.integers(1, 200), shift=st.sampled_from([0.0, 1.0]))
def test_agrees_with_the_readable_reference(form: GroupFormat, seed: int, length: int, shift: float) -> None:
    value = drawn(seed, (2, length, 3), 0.1, shift)
    packed = QuantizedFactor.of(value, -2, form)
    found, step = packed.unpacked(torch.float32), step_of(packed)
    for n in range(2):
        for r in range(3):
            difference = (found[n, :, r] - reference(value[n, :, r], form)).abs() / step[n, :, r]
            assert (difference > 1e-4).float().mean() <= 0.02  # a number half-way between two may go either way
            assert (difference <= 1.0001).all()


def test_groups_do_not_share_anything() -> None:
    value = drawn(0, (2, 100, 3), 0.1, 0.0)
    form = GroupFormat(group_size=32)
    before = QuantizedFactor.of(value, -2, form).unpacked(torch.float32)
    value[1, 32:64, 2] *= 1000
    changed = QuantizedFactor.of(value, -2, form).unpacked(torch.float32) != before
    assert changed[1, 32:64, 2].any()
    changed[1, 32:64, 2] = False
    assert not changed.any()


@pytest.mark.parametrize("length", [64, 70])
def test_experts_are_packed_one_by_one(length: int) -> None:
    value = drawn(0, (4, length, 6), 0.1, 0.0)
    for form in (GroupFormat(), GroupFormat(symmetric=False)):
        whole = QuantizedFactor.of(value, -2, form)
        for e in range(4):
            own = QuantizedFactor.of(value[e], -2, form)
            assert all(part.is_contiguous() for part in own.parts().values())  # files take no others
            assert all(torch.equal(part[e], own.parts()[name]) for name, part in whole.parts().items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sizes_are_what_the_format_says(bits: int, symmetric: bool) -> None:
    form = GroupFormat(bits, 64, symmetric)
    packed = QuantizedFactor.of(torch.randn(3, 130, 8), -2, form)
    codes, scales = 130 * bits // 8, 3 * 2
    zeros = 0 if symmetric else -(-3 * bits // 8)
    assert packed.nbytes == 3 * 8 * (codes + scales + zeros)
    built = QuantizedFactor.of(torch.empty(3, 130, 8, device="meta"), -2, form)
    assert built.nbytes == packed.nbytes
    assert {n: (p.shape, p.dtype) for n, p in built.parts().items()} == {
        n: (p.shape, p.dtype) for n, p in packed.parts().items()
    }


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_extreme_numbers(scale_dtype: torch.dtype) -> None:
    form = GroupFormat(scale_dtype=scale_dtype)
    zeros = QuantizedFactor.of(torch.zeros(1, 64, 2), -2, form).unpacked(torch.float32)
    assert torch.equal(zeros, torch.zeros(1, 64, 2))
    broken = torch.zeros(1, 64, 2)
    broken[0, 3, 1] = torch.nan
    found = QuantizedFactor.of(broken, -2, form).unpacked(torch.float32)
    assert found[..., 1].isnan().all()  # a factor that is not finite shows, and only in its own group
    assert torch.equal(found[..., 0], zeros[..., 0])
    huge = QuantizedFactor.of(torch.full((1, 64, 2), 1e7), -2, form).unpacked(torch.float32)
    assert huge.isfinite().all()


def test_parts_of_another_form_are_refused() -> None:
    packed = QuantizedFactor.of(torch.randn(2, 64, 3), -2, GroupFormat())
    assert torch.equal(packed.with_parts(packed.parts()).unpacked(torch.float32), packed.unpacked(torch.float32))
    with pytest.raises(ValueError, match="scales: missing"):
        packed.with_parts({"codes": packed.codes_XB})
    with pytest.raises(ValueError, match=r"codes: torch\.int8"):
        packed.with_parts({**packed.parts(), "codes": packed.codes_XB.char()})
    with pytest.raises(ValueError, match="zeros: missing"):
        replace(packed, zeros_XB=packed.codes_XB).with_parts(packed.parts())


@settings(max_examples=40)
@given(
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([32, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
    length=st.integers(1, 200),
    axis=st.sampled_from([-1, -2]),
    magnitude=st.sampled_from([0.0, 1e-5, 0.02, 300.0]),
)
def test_what_was_rounded_stochastically_is_quantized_to_itself(
    bits: int, size: int, dtype: torch.dtype, seed: int, length: int, axis: int, magnitude: float
) -> None:
    value = drawn(seed, (3, length, 2) if axis == -2 else (3, 2, length), magnitude, 0.0)
    form = GroupFormat(bits, size, True, dtype)
    packed = QuantizedFactor.of(value, axis, form, [noise_key(seed, expert) for expert in range(3)])
    again = QuantizedFactor.of(packed.unpacked(torch.float32), axis, form)
    assert all(torch.equal(part, again.parts()[name]) for name, part in packed.parts().items())
    assert ((packed.unpacked(torch.float32) - value).abs() <= 1.02 * step_of(packed)).all()
    alone = QuantizedFactor.of(value[1:2], axis, form, [noise_key(seed, 1)])
    assert torch.equal(alone.codes_XB, packed.rows(slice(1, 2)).codes_XB), "noise belongs to the expert, not its slot"


def test_stochastic_rounding_is_right_on_average() -> None:
    """The mean over 4,000 roundings is within five of its own standard errors; sixteen numbers and their scale."""
    value_NL = drawn(1, (1, 1, 16), 0.02, 0.0).expand(4000, 1, 16)
    packed = QuantizedFactor.of(value_NL, -1, GroupFormat(4, 32), [noise_key(key) for key in range(4000)])
    error_NL = (packed.unpacked(torch.float32) - value_NL)[:, 0]
    assert (error_NL.mean(0).abs() < 5 * error_NL.std(0) / 4000**0.5 + 1e-6).all()
    assert error_NL.std(0).amax() > 0.2 * step_of(packed).mean()
