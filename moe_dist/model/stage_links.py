"""Messages between pipeline stages outside of training passes: hidden states in evaluation, and tied embeddings."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.mesh import GroupKind, Mesh


class StageLinks:
    """Point-to-point messages between this rank and the ranks of the same position in other stages."""

    def __init__(self, mesh: Mesh) -> None:
        self._group, self._own = mesh.group(GroupKind.PIPELINE), mesh.stage
        self._sent: tuple[dist.Work | None, Tensor] | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self._group.size

    def send_on(self, hidden: Tensor) -> None:
        """Send a tensor to the next stage, after the last one to the first."""
        self.send(hidden, (self._own + 1) % self._group.size)

    def receive_from_before(self, like: Tensor) -> Tensor:
        """Return a tensor of the shape of `like` from the stage before."""
        return self.receive(like, (self._own - 1) % self._group.size)

    def send(self, value: Tensor, stage: int) -> None:
        """Start to send a tensor to a stage, after the message before is sent."""
        self.finish()
        kept = value.detach().contiguous()
        self._sent = dist.isend(kept, self._group.ranks[stage], group=self._group.handle), kept

    def receive(self, like: Tensor, stage: int) -> Tensor:
        """Return a tensor of the shape of `like` from a stage."""
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(found, self._group.ranks[stage], group=self._group.handle)
        return found

    def finish(self) -> None:
        """Wait until the last message is sent."""
        if self._sent is not None and self._sent[0] is not None:
            self._sent[0].wait()
        self._sent = None


class TiedEmbedding:
    """Embedding of the first pipeline stage as the weight of the last one's output layer.

    It is a parameter of the first stage alone: the last one gets a copy for each step, and sends the gradient back.

    Attributes:
        weight: the parameter, on the first stage.
        copy: the copy, on the last stage between `fetch` and `drop`.
    """

    def __init__(self, links: StageLinks, weight: nn.Parameter | None, last: bool) -> None:
        self._links, self._last, self.weight = links, last, weight
        self.copy: Tensor | None = None

    def fetch(self, like: Tensor) -> None:
        """Copy the weight to the last stage; collective over the stages.

        Args:
            like: tensor of the weight's shape, type and device.
        """
        if self.weight is not None:
            self._links.send(self.weight, self._links.stages - 1)
            self._links.finish()
        if self._last:
            self.copy = self._links.receive(like, 0).requires_grad_()

    def gradient(self) -> Tensor | None:
        """Return on the first stage the gradient of the copy, which is dropped; collective over the stages."""
        if self.copy is not None:
            assert self.copy.grad is not None
            self._links.send(self.copy.grad, 0)
            self._links.finish()
        self.drop()
        return None if self.weight is None else self._links.receive(self.weight, self._links.stages - 1)

    def drop(self) -> None:
        """Free the copy."""
        self.copy = None
