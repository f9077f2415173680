"""Pseudo-random permutations that are computed index by index: a shuffle of any size needs no memory.

A Feistel network over numbers of 2h bits is a permutation of them; a number beyond the size is encrypted again until
one is inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
"""

import hashlib

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 8
_FEWEST_BITS = 2  # of a half: networks over fewer numbers are too few to give every order of a small set
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


class Permutation:
    """Permutation of [0, size), the same for an equal key on any machine."""

    def __init__(self, size: int, *key: int | str) -> None:
        self.size = size
        half = max(_FEWEST_BITS, -(-(size - 1).bit_length() // 2))
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, indices: Indices) -> Indices:
        """Return the places [n] to which indices [n] are permuted."""
        places = self._encrypt(indices.astype(np.uint64))
        while (outside := places >= self.size).any():
            places[outside] = self._encrypt(places[outside])
        return places.astype(np.int64)

    def _encrypt(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return (left << self._half) | right


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash 64 bits, as splitmix64 does (Steele, Lea, Flood, OOPSLA 2014); products wrap around."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MULTIPLIERS[0]
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MULTIPLIERS[1]
    return numbers ^ (numbers >> np.uint64(31))
