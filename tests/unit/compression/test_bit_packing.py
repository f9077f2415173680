"""Small numbers in bytes: read back as they were, in as few bytes as they need."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.compression.bit_packing import pack, unpack


@given(bits=st.sampled_from([1, 2, 4, 8]), rows=st.integers(0, 3), length=st.integers(1, 40), seed=st.integers(0, 999))
def test_what_is_packed_is_read_back(bits: int, rows: int, length: int, seed: int) -> None:
    code = torch.randint(1 << bits, (rows, length), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(code, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-length * bits // 8))
    assert torch.equal(unpack(packed, length, bits), code)


def test_the_first_number_is_in_the_lowest_bits() -> None:
    packed = pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4)
    assert packed.tolist() == [0x21, 0x0F]
