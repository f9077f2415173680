"""Copies between tiers concurrent with computation, on a side stream where the device has streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Transfers:
    """Ordering of copies and computation on one device; on a CPU both are synchronous."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        self._events: dict[int, Any] = {}
        if device.type != "cpu":
            self._module = torch.get_device_module(device)
            self._stream = self._module.Stream(device)

    @contextmanager
    def side_stream(self, values: Tensor, wait: bool = False) -> Iterator[None]:
        """Run copies on the side stream, after the computation that is queued so far.

        Args:
            wait: wait for the copies, because the buffer may be reused on return.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(self._module.current_stream(values.device))
        with self._module.stream(self._stream):
            yield
            self._events[values.data_ptr()] = self._stream.record_event()
        if wait:
            self._stream.synchronize()

    def wait_for(self, values: Tensor) -> None:
        """Make the computation that follows wait for the values, without blocking the host."""
        event = self._events.pop(values.data_ptr(), None) if self._stream is not None else None
        if event is not None:
            self._module.current_stream(values.device).wait_event(event)
