"""Random generators of this process, as a part of a checkpoint."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """States of torch's generators (CPU and current accelerator), numpy's and Python's, for each rank."""

    own_of_rank = ("torch", "device", "numpy", "numpy_position", "python")

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generators' states as integers."""
        _, keys, *position = np.random.get_state(legacy=True)
        state = {
            "torch": torch.get_rng_state(),
            "numpy": torch.from_numpy(np.array(keys, dtype=np.int64)),
            "numpy_position": torch.tensor(position, dtype=torch.float64),
            "python": torch.tensor(random.getstate()[1]),
        }
        if torch.accelerator.is_available():
            state["device"] = torch.get_device_module().get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Restore the generators; on another number of ranks or kind of device they stay as seeded."""
        if not state:
            return
        torch.set_rng_state(state["torch"])
        position, has_gauss, gauss = state["numpy_position"].tolist()
        keys = state["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
        random.setstate((3, tuple(state["python"].tolist()), None))
        if "device" in state and torch.accelerator.is_available():
            torch.get_device_module().set_rng_state(state["device"])
