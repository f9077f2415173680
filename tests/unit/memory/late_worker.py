"""The thread that fetches ahead, as late as a test wants it: it does nothing until it is told to catch up."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class LateWorker:
    """Takes the place of a cache's executor."""

    def __init__(self) -> None:
        self._queue: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []
        self.done: list[Any] = []
        """The blocks whose generation has come."""

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Puts work off."""
        future: Future[Any] = Future()
        self._queue.append((future, work, args))
        return future

    def catch_up(self, block: Any = None) -> None:
        """Does what has been put off, all or that of one block, in order, in the thread that calls."""
        now = [task for task in self._queue if block in (None, task[2][0])]
        self._queue = [task for task in self._queue if task not in now]
        for future, work, args in now:
            future.set_result(work(*args))
            self.done.append(args[0])

    def shutdown(self, *, cancel_futures: bool) -> None:
        """Forgets what has been put off."""
        assert cancel_futures
        self._queue.clear()
