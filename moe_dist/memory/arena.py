"""Memory within a budget: accounting of all buffers, and their reuse."""

from collections import defaultdict

import torch
from torch import Tensor

from moe_dist.errors import OffloadError


class Account:
    """Byte counter of one memory; exceeding its budget raises at once."""

    def __init__(self, budget: int | None, what: str, key: str = "memory.device_budget_bytes") -> None:
        """Open an account.

        Args:
            budget: bytes; None: unlimited.
            what: name of the memory in errors.
            key: configuration key of the budget in errors.
        """
        self.budget, self.in_use, self.peak = budget, 0, 0
        self._what, self._key = what, key

    @property
    def room(self) -> float:
        """Bytes left in the budget."""
        return float("inf") if self.budget is None else self.budget - self.in_use

    def reserve(self, size: int) -> None:
        """Count bytes that are allocated.

        Raises:
            OffloadError: the budget is too small; nothing is changed.
        """
        if size > self.room:
            raise OffloadError(
                f"{self._what}: {size:,} bytes more than the {self.in_use:,} in use would exceed the budget of "
                f"{self.budget:,}: raise {self._key}"
            )
        self.in_use += size
        self.peak = max(self.peak, self.in_use)

    def free(self, size: int) -> None:
        """Count bytes that are freed."""
        assert 0 <= size <= self.in_use, f"{size} bytes are freed, {self.in_use} are in use"
        self.in_use -= size


class Arena:
    """Buffers on one device; released ones are reused for blocks of the same size until their room is needed."""

    def __init__(self, account: Account, device: torch.device, pinned: bool = False) -> None:
        self.account, self._device, self._pinned = account, device, pinned
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def fits(self, size: int) -> bool:
        """Return True if `allocate` would succeed."""
        return bool(self._free[size]) or self.account.room + self._idle >= size

    def allocate(self, size: int) -> Tensor:
        """Return a uint8 buffer of `size` bytes, its content undefined.

        Raises:
            OffloadError: the budget is too small.
        """
        if self._free[size]:
            return self._free[size].pop()
        while self.account.room < size and self._idle:
            largest = max(other for other, buffers in self._free.items() if buffers)
            self._free[largest].pop()
            self.account.free(largest)
        self.account.reserve(size)
        return torch.empty(size, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)

    def release(self, buffer: Tensor) -> None:
        """Keep a buffer for the next block of its size."""
        self._free[len(buffer)].append(buffer)

    @property
    def _idle(self) -> int:
        return sum(size * len(buffers) for size, buffers in self._free.items())
