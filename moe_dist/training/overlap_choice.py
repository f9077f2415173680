"""Choice of the number of chunks that overlap dispatch and computation (`moe.overlap_chunks`), once per run.

The number determines the order in which gradients are summed, and so their last bits; it is therefore saved in
checkpoints. On CPUs of a single node, whose cores also copy the messages, it is 1 without a measurement.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from moe_dist.config import RunConfig, WorldShape
from moe_dist.dispatch.chunked_overlap import choose_chunks
from moe_dist.distributed.links import Links
from moe_dist.engine.callback import Callback
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.metrics.recorder import Recorder
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.overlap_probe import measure_exchange_speed


class OverlapChoice(Callback):
    """Callback that chooses the number of chunks and saves it in checkpoints."""

    def __init__(
        self, config: RunConfig, shape: WorldShape, links: Links, device: torch.device, tokens: int, recorder: Recorder
    ) -> None:
        """Start without a choice.

        Args:
            tokens: number of tokens of a rank's micro-batch.
        """
        self._config, self._device, self._tokens, self._recorder = config, device, tokens, recorder
        self._nodes = len(set(links.node_of_rank))
        self._layout = f"{shape} on {self._nodes} node(s)"
        self.chunks: int | None = None

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Set the chunks of this engine's model at the next start."""
        self._layers = engine.model.clustered_layers()

    def release(self) -> None:
        """Drop the references to the model's layers."""
        self._layers = []

    def start(self, step: int) -> None:
        """Set the layers' number of chunks, measured first if it has not been chosen; collective."""
        layers = self._layers
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
            f"dispatch in {chunks} chunk(s): {1e3 * speed.exchange:.1f} ms of all-to-all, {1e3 * speed.compute:.1f} "
            f"ms of computation, {speed.hidden:.0%} of an exchange overlapped"
        )
        return chunks

    def state(self) -> dict[str, Any]:
        """Return the choice for checkpoints."""
        return {"overlap": self}

    def state_dict(self) -> dict[str, Any]:
        """Return the choice and the layout of ranks for which it was made."""
        return {} if self.chunks is None else {"chunks": self.chunks, "layout": self._layout}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore an earlier choice, unless the layout of ranks has changed."""
        if state["layout"] == self._layout:
            self.chunks = int(state["chunks"])
