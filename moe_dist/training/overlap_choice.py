"""Into how many chunks a run divides the hop to the clusters (`moe.overlap_chunks`): chosen once, and kept.

The choice decides in which order gradients are summed, and so the last bits: it belongs in a run's checkpoints, and on
a CPU without other nodes, where messages are moved by the processors that compute, it is 1 without a measurement.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from moe_dist.config import RunConfig, WorldShape
from moe_dist.dispatch.chunked_overlap import choose_chunks
from moe_dist.distributed.links import Links
from moe_dist.metrics.recorder import Recorder
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.overlap_probe import measure_exchange_speed


class OverlapChoice:
    """The number of chunks of a run, as a part of its checkpoints."""

    def __init__(
        self, config: RunConfig, shape: WorldShape, links: Links, device: torch.device, tokens: int, recorder: Recorder
    ) -> None:
        """Args: tokens: of a rank's micro-batch."""
        self._config, self._device, self._tokens, self._recorder = config, device, tokens, recorder
        self._nodes = len(set(links.node_of_rank))
        self._layout = f"{shape} on {self._nodes} node(s)"
        self.chunks: int | None = None

    def apply(self, model: LanguageModel, step: int) -> None:
        """Has the model's layers work so; measures where there is no choice yet. Collective."""
        layers = model.clustered_layers()
        if not layers or self._config.moe.overlap_chunks != "auto":
            return
        if self.chunks is None:
            self.chunks = self._choose(layers[0], step)
        for layer in layers:
            layer.set_chunks(self.chunks)

    def _choose(self, layer: ClusteredMoE, step: int) -> int:
        config = self._config
        if layer.stage_one.alone or config.memory.offload or config.moe.needs_whole_batches:
            return 1
        if self._device.type == "cpu" and self._nodes == 1:
            return 1
        speed = measure_exchange_speed(layer, self._tokens)
        chunks = choose_chunks(speed)
        self._recorder.event("overlap", step, chunks=chunks, **asdict(speed))
        self._recorder.note(
            f"tokens travel to their clusters in {chunks} chunk(s): {1e3 * speed.exchange:.1f} ms on the wire, "
            f"{1e3 * speed.compute:.1f} ms in computation, {speed.hidden:.0%} of an exchange hidden behind it"
        )
        return chunks

    def state_dict(self) -> dict[str, Any]:
        """The choice, and the layout that it is for."""
        return {} if self.chunks is None else {"chunks": self.chunks, "layout": self._layout}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Keeps an earlier choice, unless ranks are laid out otherwise now."""
        if state["layout"] == self._layout:
            self.chunks = int(state["chunks"])
