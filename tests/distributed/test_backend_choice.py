"""All ranks use one backend: the one that rank 0 finds, or that works on all, or that the checkpoint holds."""

from datetime import timedelta

import torch
import torch.distributed as dist

from moe_dist.config import load_config, resolve_world
from moe_dist.distributed.init import RankInfo
from moe_dist.kernels.backend_choice import BackendTimes
from moe_dist.metrics.recorder import NullRecorder
from moe_dist.training import backend_choice as module
from tests.distributed.ranks import run_ranks


class Layer:
    """Layer that keeps what it is told."""

    backend = "auto"

    def set_backend(self, backend: str) -> None:
        self.backend = backend


def _choose(usable: list[list[str]], measured: str, earlier: str | None) -> tuple[str, bool]:
    rank = dist.get_rank()
    asked = []

    def measure(*_: object) -> BackendTimes:
        asked.append(rank)
        return BackendTimes({}, measured)

    vars(module).update(available_backends=lambda *_: usable[rank], measure_backends=measure)
    config = load_config(None, ["train.global_batch_size=2"])
    process = RankInfo(rank, 2, torch.device("cpu"), timedelta(seconds=60))
    choice = module.BackendChoice(config, resolve_world(config, 2), process, 64, NullRecorder(None))
    if earlier is not None:
        choice.load_state_dict({"backend": earlier})
    layer = Layer()
    choice._layers = [layer]  # type: ignore[list-item]
    choice.start(0)
    assert choice.state_dict() == {"backend": layer.backend}
    return layer.backend, bool(asked)


def test_the_ranks_agree() -> None:
    both, plain = ["masked", "sorted", "cpu"], ["masked", "sorted"]
    assert run_ranks(_choose, 2, [both, both], "sorted", None) == [("sorted", True), ("sorted", False)]
    assert run_ranks(_choose, 2, [both, plain], "cpu", None) == [("masked", True), ("masked", False)]
    assert run_ranks(_choose, 2, [both, both], "sorted", "cpu") == [("cpu", False), ("cpu", False)]
    assert run_ranks(_choose, 2, [both, plain], "sorted", "cpu") == [("sorted", True), ("sorted", False)]
