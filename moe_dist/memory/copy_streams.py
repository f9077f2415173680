"""Copies between tiers beside the computation: on a stream of their own where the device has streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Transfers:
    """Orders copies and computation on one device; on a CPU both are done when the call returns."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        self._arrived: dict[int, Any] = {}
        if device.type != "cpu":
            self._module = torch.get_device_module(device)
            self._stream = self._module.Stream(device)

    @contextmanager
    def beside(self, values: Tensor, leaving: bool = False) -> Iterator[None]:
        """Runs copies on the side stream, after what the computation has done to the values so far.

        Args:
            leaving: the buffer may be used again when this returns, so the copy is waited for.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(self._module.current_stream(values.device))
        with self._module.stream(self._stream):
            yield
            self._arrived[values.data_ptr()] = self._stream.record_event()
        if leaving:
            self._stream.synchronize()

    def await_arrival(self, values: Tensor) -> None:
        """The computation that follows waits for the values, without stopping the host."""
        event = self._arrived.pop(values.data_ptr(), None) if self._stream is not None else None
        if event is not None:
            self._module.current_stream(values.device).wait_event(event)
