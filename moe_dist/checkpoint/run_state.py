"""Complete state of a run: model, optimizer, and other stateful parts."""

from pathlib import Path

from moe_dist.checkpoint.find import ValidCheckpoint
from moe_dist.checkpoint.manifest import DataRecord, Manifest, read_index
from moe_dist.checkpoint.model_state import store_packed, training_tensors_of, weights_of
from moe_dist.checkpoint.placement_record import adopt_placements, placement_to_record
from moe_dist.checkpoint.save_and_load import read_checkpoint
from moe_dist.checkpoint.sharded_tensor import State
from moe_dist.checkpoint.stateful import Parts, allocate_like, load_state, tensors_of, values_of
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.engine.optimizer_state import MASTER, STATE_NAMES
from moe_dist.errors import CheckpointError
from moe_dist.metrics import installed_versions


class RunState:
    """State of a run between two steps.

    Args:
        data: training tokens; the position in them is the step.
        parts: other state that must be restored, by name.
    """

    def __init__(self, engine: DeepSpeedEngine, data: DataRecord, parts: Parts) -> None:
        self._engine, self._data, self._parts = engine, data, parts

    def checkpoint(self, step: int) -> tuple[Manifest, State]:
        """Return the complete state after `step` steps, for resuming. Its tensors alias the live ones."""
        process = self._engine.process
        optimizer = self._engine.training_state()
        manifest = self._manifest(step).model_copy(
            update={"kind": "training", "updates": optimizer.steps, "values": values_of(self._parts)}
        )
        tensors = training_tensors_of(self._engine.model, optimizer)
        return manifest, {**tensors, **tensors_of(self._parts, process.rank, process.ranks)}

    def weights(self, step: int) -> tuple[Manifest, State]:
        """Return the weights and the parts that the model computes with, for evaluation and export."""
        process = self._engine.process
        tensors = training_tensors_of(self._engine.model, self._engine.training_state(), (MASTER,))
        balance: Parts = {"balance": self._engine.model.context.balance}
        return self._manifest(step), {**tensors, **tensors_of(balance, process.rank, process.ranks)}

    def restore(self, found: ValidCheckpoint) -> None:
        """Restore the run from a checkpoint that any number of ranks wrote; collective.

        Raises:
            CheckpointError: it holds no training state, or is incompatible.
        """
        manifest = found.manifest
        if manifest.kind != "training":
            raise CheckpointError(f"{found.path} holds weights only: start a new run from it with checkpoint.init")
        self._read(found.path, manifest, self._parts, STATE_NAMES)
        self._engine.training_state().steps = manifest.updates

    def start_from(self, path: Path, manifest: Manifest) -> None:
        """Set weights and load balance to those of a checkpoint or of final weights, and nothing else; collective.

        Raises:
            CheckpointError: they are of another model.
        """
        self._read(path, manifest, {"balance": self._engine.model.context.balance}, (MASTER,))

    def _read(self, path: Path, manifest: Manifest, parts: Parts, names: tuple[str, ...]) -> None:
        """Read placements, weights, the optimizer's tensors of these names, and parts."""
        engine, process = self._engine, self._engine.process
        adopt_placements(engine.model, manifest)
        filled = allocate_like(parts, read_index(path), process.rank, process.ranks)
        state = engine.training_state()
        read_checkpoint(path, weights_of(engine.model, state))
        tensors = training_tensors_of(engine.model, state, names)
        read_checkpoint(path, {**tensors, **filled})
        store_packed(engine.model, state, tensors)
        load_state(parts, filled, manifest)

    def _manifest(self, step: int) -> Manifest:
        engine = self._engine
        return Manifest(
            kind="weights",
            step=step,
            ranks=engine.process.ranks,
            config=engine.config.model_dump(mode="json"),
            data=self._data.model_copy(update={"next_step": step}),
            placements=[placement_to_record(placement) for placement in engine.model.context.placements],
            versions=installed_versions(),
        )
