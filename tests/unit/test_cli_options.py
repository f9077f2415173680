"""Options built from specifications: nested fields, lists, defaults, and what only some commands take."""

import inspect
from typing import Any

from moe_dist.benchmarks.layer.spec import GrowthSpec, LayerBenchSpec, LayerShape, RanksBenchSpec
from moe_dist.cli.options import build, takes


def test_a_command_receives_the_specification_of_what_was_given() -> None:
    received: list[GrowthSpec] = []

    @takes(spec=GrowthSpec)
    def command(spec: GrowthSpec) -> None:
        received.append(spec)

    parameters = inspect.signature(command).parameters
    assert {"tokens", "experts", "top_k"} <= parameters.keys()
    assert not {"spec", "shape", "clusters", "wire_dtype"} & parameters.keys()
    command(**{**dict.fromkeys(parameters), "tokens": 7, "experts": [4, 8]})
    assert received == [GrowthSpec(LayerShape(tokens=7), experts=(4, 8))]


def test_several_specifications_share_options() -> None:
    received: list[dict[str, Any]] = []

    @takes(given=(LayerBenchSpec, RanksBenchSpec))
    def command(given: dict[str, Any]) -> None:
        received.append(given)

    parameters = inspect.signature(command).parameters
    command(**{**dict.fromkeys(parameters), "hidden": 16, "peers": ["megatron"], "top_k": []})
    assert received == [{"hidden": 16, "peers": ("megatron",)}]
    assert build(RanksBenchSpec, received[0]) == RanksBenchSpec(LayerShape(hidden=16), peers=("megatron",))
    assert build(LayerBenchSpec, received[0]) == LayerBenchSpec(hidden=16)
