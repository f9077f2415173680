"""Division of tensors into files of limited size."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def grouped_by_bytes(items: Iterable[Item], bytes_of: Callable[[Item], int], largest: int) -> list[list[Item]]:
    """Return the items in their order in groups of at most `largest` bytes; a larger item has a group of its own."""
    groups: list[list[Item]] = [[]]
    room = largest
    for item in items:
        size = bytes_of(item)
        if size > room and groups[-1]:
            groups.append([])
            room = largest
        groups[-1].append(item)
        room -= size
    return groups
