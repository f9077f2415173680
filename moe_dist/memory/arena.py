"""Memory within a budget: an accountant that every buffer passes, and buffers that are used again."""

from collections import defaultdict

import torch
from torch import Tensor

from moe_dist.errors import OffloadError


class Account:
    """Counts bytes in and out; to exceed the budget is an error at that moment, not a drift."""

    def __init__(self, budget: int | None, what: str, key: str = "memory.device_budget") -> None:
        """Args: budget: bytes; None: as much as there is. what: names the memory in errors. key: sets the budget."""
        self.budget, self.in_use, self.peak = budget, 0, 0
        self._what, self._key = what, key

    @property
    def room(self) -> float:
        """Bytes that may still come in."""
        return float("inf") if self.budget is None else self.budget - self.in_use

    def enter(self, size: int) -> None:
        """Lets a tensor in.

        Raises:
            OffloadError: there is no room for it; nothing is changed.
        """
        if size > self.room:
            raise OffloadError(
                f"{self._what}: {size:,} bytes more than the {self.in_use:,} in use would exceed the budget of "
                f"{self.budget:,}: raise {self._key}"
            )
        self.in_use += size
        self.peak = max(self.peak, self.in_use)

    def leave(self, size: int) -> None:
        """Takes bytes off the account, which must have been let in."""
        assert 0 <= size <= self.in_use, f"{size} bytes leave, {self.in_use} are in"
        self.in_use -= size


class Arena:
    """Buffers on one device; those given back are kept for the next block of their size while nobody needs the room."""

    def __init__(self, account: Account, device: torch.device, pinned: bool = False) -> None:
        self.account, self._device, self._pinned = account, device, pinned
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def fits(self, size: int) -> bool:
        """Whether `take` would succeed."""
        return bool(self._free[size]) or self.account.room + self._idle >= size

    def take(self, size: int) -> Tensor:
        """A buffer of so many bytes, uint8, its content undefined.

        Raises:
            OffloadError: the budget does not allow it.
        """
        if self._free[size]:
            return self._free[size].pop()
        while self.account.room < size and self._idle:
            self._give_up(max(other for other, buffers in self._free.items() if buffers))
        self.account.enter(size)
        return torch.empty(size, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)

    def give_back(self, buffer: Tensor) -> None:
        """Keeps a buffer for the next one of its size."""
        self._free[len(buffer)].append(buffer)

    def _give_up(self, size: int) -> None:
        self._free[size].pop()
        self.account.leave(size)

    @property
    def _idle(self) -> int:
        return sum(size * len(buffers) for size, buffers in self._free.items())
