"""The checksum of what travels: its formula whatever the chunks, and what it sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.recluster import transfer
from moe_dist.recluster.transfer import checksum

BODIES = st.binary(max_size=100)


def _by_the_formula(body: bytes) -> int:
    padded = body + bytes(-len(body) % 4)
    words = [int.from_bytes(padded[i : i + 4], "little", signed=True) for i in range(0, len(padded), 4)]
    total = sum(word * (2 * place + 1) for place, word in enumerate(words)) + len(body)
    return (total + 2**63) % 2**64 - 2**63


def _tensor(body: bytes) -> torch.Tensor:
    return torch.tensor(list(body), dtype=torch.uint8)


@given(BODIES, st.sampled_from([1, 2, 7, 2**20]))
def test_it_is_its_formula_in_chunks_of_any_size(body: bytes, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHECKSUM_CHUNK", chunk)
        assert int(checksum(_tensor(body))) == _by_the_formula(body)


@given(st.binary(min_size=8, max_size=100), st.data())
def test_it_sees_a_changed_byte_and_two_words_exchanged(body: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(body) - 1))
    changed = bytearray(body)
    changed[place] ^= data.draw(st.integers(1, 255))
    assert int(checksum(_tensor(bytes(changed)))) != int(checksum(_tensor(body)))
    first, second, rest = body[:4], body[4:8], body[8:]
    if first != second:
        assert int(checksum(_tensor(second + first + rest))) != int(checksum(_tensor(body)))
