"""A recorder for models that are trained to be measured."""

from pathlib import Path

from moe_dist.training.recorder import Recorder


class SilentRecorder(Recorder):
    """Knows a folder, on rank 0, and writes nothing there: what training tells is not what is asked."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @property
    def folder(self) -> Path | None:
        """The folder it was given."""
        return self._path
