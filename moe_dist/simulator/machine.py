"""Machine of a prediction: a device by name, or fitted constants, stored as JSON."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from moe_dist.config import Section
from moe_dist.errors import ConfigError
from moe_dist.simulator.hardware import DEVICES, Device, Fabric

Positive = Annotated[float, Field(gt=0)]
Read = TypeVar("Read", bound=Section)


def _known(value: Any) -> Any:
    """Return a device by its name, else its fields, of which none may be misspelt."""
    if isinstance(value, str):
        if value.lower() not in DEVICES:
            raise ValueError(f"{value!r} is no known device: use one of {', '.join(DEVICES)}")
        return DEVICES[value.lower()]
    names = [field.name for field in fields(Device)]
    if isinstance(value, dict) and (unknown := [name for name in value if name not in names]):
        raise ValueError(f"{unknown[0]!r} is no field of a device: use {', '.join(names)}")
    return value


class Machine(Section):
    """Part of a machine that does not depend on the number of nodes."""

    device: Annotated[Device, BeforeValidator(_known)] = Field(description="fields of `Device`, or a known one's name")
    rails: Annotated[int, Field(ge=1)] | None = Field(None, description="interfaces of a node; null: one a device")
    cores: Annotated[int, Field(ge=1)] | None = Field(
        None, description="that all ranks together take turns on; null: each has a device of its own"
    )
    node_latency: Positive = Field(10e-6, description="seconds of an exchange inside a node, at least")
    network_latency: Positive = Field(25e-6, description="seconds of an exchange between nodes, at least")

    def fabric(
        self,
        nodes: int,
        per_node: int,
        rails: int | None = None,
        pod_nodes: int | None = None,
        oversubscription: float = 1.0,
        network_bandwidth: float | None = None,
    ) -> Fabric:
        """Return so many nodes, connected; None: the machine's defaults, and pods of at most 32 nodes."""
        return Fabric(
            replace(self.device, network_bandwidth=network_bandwidth or self.device.network_bandwidth),
            nodes,
            per_node,
            rails or self.rails or per_node,
            pod_nodes or min(nodes, 32),
            oversubscription,
            self.node_latency,
            self.network_latency,
            max(1.0, nodes * per_node / self.cores) if self.cores else 1.0,
        )


def read_section(file: Path, kind: type[Read], what: str) -> Read:
    """Read a JSON file of one of the simulator's types.

    Raises:
        ConfigError: it cannot be read or has another form; names the file, the key and the error.
    """
    try:
        return kind.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{what} {file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{what} {file}: {key}{': ' if key else ''}{' '.join(first['msg'].split())}") from error
