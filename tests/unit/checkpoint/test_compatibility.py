"""Which changes of the configuration a checkpoint allows, and placements on another shape of ranks."""

from typing import Any

import pytest

from moe_dist.checkpoint.compatibility import check_config_compatible
from moe_dist.checkpoint.manifest import PlacementRecord
from moe_dist.checkpoint.placement_record import placement_from_record, placement_to_record
from moe_dist.config import WorldShape, load_config
from moe_dist.distributed.placement import ExpertPlacement
from moe_dist.errors import CheckpointError
from tests.unit.checkpoint.samples import DATA, manifest


@pytest.mark.parametrize(
    "words",
    [
        ["moe.experts=64"],
        ["moe.rank=5", "seed=4"],
        ["model.layers=3"],
        ["model.rope_base=5000"],
        ["train.global_batch_size=64"],
        ["tokenizer.kind=unigram"],
        ["moe.top_k=1"],
        ["moe.gate_scale=2"],
        ["corpus.packing=best_fit"],
    ],
)
def test_other_tensors_another_model_or_other_batches_are_refused(words: list[str]) -> None:
    with pytest.raises(CheckpointError, match="of step 1 does not fit the configuration") as caught:
        check_config_compatible(manifest(), load_config(None, [*words, "train.steps=900"]), DATA)
    assert all(word.partition("=")[0] in str(caught.value) for word in words)
    assert "train.steps" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.steps=900", "optimizer.epsilon=1"], ["optimizer.epsilon: 1e-08 -> 1.0", "train.steps: 400 -> 900"]),
        (["world.zero_stage=2", "world.data=2"], ["world.data: None -> 2", "world.zero_stage: 1 -> 2"]),
        (["moe.wire_dtype=float32"], ["moe.wire_dtype: 'bfloat16' -> 'float32'"]),
        (["train.precision=float32"], ["train.precision: 'bfloat16' -> 'float32'"]),
        (["name=other", "runs_dir=/x", "checkpoint.every=7", "watchdog.seconds=0", "corpus.cache_dir=/y"], []),
    ],
)
def test_what_may_differ_is_said(words: list[str], said: list[str]) -> None:
    here = ["train.precision=bfloat16"]  # auto is another type on another processor
    then = manifest(config=load_config(None, here))
    assert sorted(check_config_compatible(then, load_config(None, [*here, *words]), DATA)) == said


def test_a_change_of_weights_is_said_and_another_order_refused() -> None:
    blend = "corpus.sources={a: {}, b: {}}"
    then, change = manifest(config=load_config(None, [blend])), "corpus.schedule=[{step: 1, weights: {a: 2}}]"
    (said,) = check_config_compatible(then, load_config(None, [blend, change]), DATA)
    assert said.startswith("corpus.schedule: [] -> [{'step': 1")
    with pytest.raises(CheckpointError, match=r"^the checkpoint's run read its sequences in another order"):
        check_config_compatible(manifest(), load_config(None), DATA.model_copy(update={"order": 1}))


@pytest.mark.parametrize(
    ("words", "why"),
    [(["corpus.max_bytes=5"], "corpus.max_bytes: None -> 5"), ([], "so the text itself has changed")],
)
def test_other_tokens_are_refused(words: list[str], why: str) -> None:
    other = DATA.model_copy(update={"train_checksum": 99})
    with pytest.raises(CheckpointError, match="training tokens differ") as caught:
        check_config_compatible(manifest(), load_config(None, words), other)
    assert f"{why}; to train its weights on other text, start a new run with checkpoint.init" in str(caught.value)


SCATTERED = ExpertPlacement(((5, 0), (1, 4), (2, 7), (6, 3)), (1, 0, 0, 1), blocks=2, shards=1, version=3)


def test_a_placement_returns_as_it_was_on_the_same_shape() -> None:
    assert placement_from_record(placement_to_record(SCATTERED), WorldShape(3, 2, 1)) == SCATTERED


@pytest.mark.parametrize(
    ("shape", "blocks"), [((1, 1, 1), (0, 0, 0, 0)), ((1, 4, 2), (0, 1, 2, 3)), ((2, 2, 2), (1, 0, 0, 1))]
)
def test_on_another_shape_clusters_keep_their_members(shape: tuple[int, int, int], blocks: tuple[int, ...]) -> None:
    placement = placement_from_record(placement_to_record(SCATTERED), WorldShape(*shape))
    assert (placement.members, placement.block_of_cluster, placement.version) == (SCATTERED.members, blocks, 3)
    assert (placement.blocks, placement.shards) == shape[1:]


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (1, 3, 1)),
        ({}, (1, 8, 1)),
        ({}, (1, 1, 4)),
        ({"members": [[0, 0], [1, 2]]}, (1, 2, 1)),
        ({"members": []}, (1, 2, 1)),
        ({"block_of_cluster": [9, 9, 9, 9]}, (1, 2, 1)),
    ],
)
def test_what_is_no_placement_is_refused(change: dict[str, Any], shape: tuple[int, int, int]) -> None:
    record = PlacementRecord(**{**placement_to_record(SCATTERED).model_dump(), **change})
    with pytest.raises(CheckpointError, match="placement does not fit"):
        placement_from_record(record, WorldShape(*shape))


def test_clusters_are_dealt_to_fewer_blocks_in_the_order_of_their_numbers() -> None:
    placement = ExpertPlacement(SCATTERED.members, (3, 1, 0, 2), blocks=4, shards=1)
    found = placement_from_record(placement_to_record(placement), WorldShape(1, 2, 1))
    assert found.block_of_cluster == (0, 0, 1, 1)
