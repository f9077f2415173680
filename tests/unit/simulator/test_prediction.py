"""Routing, network, step time and plans: against token-by-token counting, hand-made cases, and what must hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import BatchShape, RunConfig, WorldShape, load_config
from moe_dist.errors import ConfigError
from moe_dist.simulator import layout_search
from moe_dist.simulator.collective_seconds import attention_seconds
from moe_dist.simulator.hardware import DEVICES, Fabric, device_named
from moe_dist.simulator.layout_search import layouts
from moe_dist.simulator.network import exchange_seconds, reduce_seconds
from moe_dist.simulator.planner import plan
from moe_dist.simulator.popularity import Floats, balanced_clusters, recorded, sample, zipf
from moe_dist.simulator.simulate import compare
from moe_dist.simulator.sizes import parameters_on_rank
from moe_dist.simulator.step_time import Scenario, step_time
from moe_dist.simulator.strategies import Strategy, demand

CONFIG = load_config(None, ["moe.experts=32", "moe.clusters=4", "moe.top_k=2", "train.global_batch_size=64"])
STANDARD = load_config(None, ["moe.kind=standard", "moe.experts=32", "moe.top_k=4"])
SHAPE = WorldShape(2, 4, 2)
H100 = DEVICES["h100"]
TWO = Scenario(Strategy.TWO_STAGE)


def _fabric(nodes: int, per_node: int, pod_nodes: int = 32, oversubscription: float = 1.0) -> Fabric:
    return Fabric(H100, nodes, per_node, per_node, pod_nodes, oversubscription)


def _random() -> np.random.Generator:
    return np.random.default_rng(1)


def _count_two_stage(config: RunConfig, shape: WorldShape, popularity_E: Floats, tokens: int) -> tuple[Floats, Floats]:
    """Rows of stage one and two between ranks, token by token: the slow reference. m = 1."""
    moe, draw = config.moe, np.random.default_rng(7)
    slots = moe.experts_per_cluster
    share_G = popularity_E.reshape(moe.clusters, slots).sum(axis=1)
    one, two = (np.zeros((shape.cluster * shape.shard,) * 2) for _ in range(2))
    for _ in range(tokens):
        for source in range(shape.cluster * shape.shard):
            cluster = draw.choice(moe.clusters, p=share_G)
            entry = cluster // (moe.clusters // shape.cluster) * shape.shard + source % shape.shard
            one[source, entry] += 1
            within = popularity_E[cluster * slots : (cluster + 1) * slots]
            chosen = draw.choice(slots, moe.top_k, replace=False, p=within / within.sum())
            for shard in {int(slot) // (slots // shape.shard) for slot in chosen}:
                two[entry, entry // shape.shard * shape.shard + shard] += 1
    return one / tokens, two / tokens


def test_two_stage_rows_are_those_of_counting_tokens() -> None:
    popularity_E = zipf(32, 0.8, 1, _random())[0]
    expected = _count_two_stage(CONFIG, SHAPE, popularity_E, 600)
    found = demand(CONFIG, SHAPE, Strategy.TWO_STAGE, popularity_E, _random())
    for flow, rows_PP in zip(found.flows, expected, strict=True):
        np.testing.assert_allclose(flow.rows_PP, rows_PP, atol=0.12)
        assert (rows_PP > 0).any()


def test_flat_sends_every_copy_and_a_limit_on_nodes_spares_the_network() -> None:
    popularity_E = zipf(32, 0.5, 1, _random())[0]
    shape = WorldShape(1, 16, 1)
    flat = demand(STANDARD, shape, Strategy.FLAT, popularity_E, _random(), devices_per_node=4)
    assert flat.flows[0].rows_PP.sum(axis=1) == pytest.approx(4)
    assert flat.work_P.sum() == pytest.approx(16 * 4)
    limited = demand(STANDARD, shape, Strategy.NODE_LIMITED, popularity_E, _random(), devices_per_node=4, most_nodes=2)
    assert limited.work_P.sum() == pytest.approx(16 * 4)
    between, inside = (flow.rows_PP for flow in limited.flows)
    assert (between.sum(axis=1) <= 2 + 1e-9).all()
    node = np.arange(16) // 4
    assert not inside[node[:, None] != node].any()
    crossing = [rows[node[:, None] != node].sum() for rows in (flat.flows[0].rows_PP, between)]
    assert crossing[1] < 0.6 * crossing[0]
    single = demand(STANDARD, WorldShape(1, 4, 1), Strategy.NODE_LIMITED, popularity_E, _random(), devices_per_node=4)
    assert len(single.flows) == 1


def test_a_token_makes_one_row_a_cluster_whatever_k_is() -> None:
    uniform = np.full(32, 1 / 32)
    for top_k in (1, 4):
        config = CONFIG.model_copy(update={"moe": CONFIG.moe.model_copy(update={"top_k": top_k})})
        found = demand(config, WorldShape(1, 4, 1), Strategy.TWO_STAGE, uniform, _random())
        assert found.flows[0].rows_PP.sum(axis=1) == pytest.approx(1)
        assert found.work_P.sum() == pytest.approx(4)
        sent = found.flows[0].bytes(1000)  # 3 of 4 rows leave, there and back in both passes, 128 numbers of 2 bytes
        assert sent.sum() / 1000 / 4 == pytest.approx(0.75 * 4 * 256, rel=0.01)


def test_the_busiest_link_sets_the_time() -> None:
    bytes_PP = np.zeros((4, 4))
    bytes_PP[0, 1] = 45e9
    inside, between = _fabric(1, 4), _fabric(2, 2)
    seconds = exchange_seconds(bytes_PP, 0.0, 1, inside, 0, _random())
    assert seconds == pytest.approx([45e9 / (450e9 * 0.8)])
    bytes_PP[0, 2] = 10e9
    assert exchange_seconds(bytes_PP, 0.0, 1, between, 0, _random()) == pytest.approx([10e9 / (50e9 * 0.8)])
    bytes_PP[3, 2], bytes_PP[1, 2] = 30e9, 25e9
    assert exchange_seconds(bytes_PP, 0.0, 1, between, 2, _random()) == pytest.approx([35e9 / 40e9 + 2 * 25e-6])


def test_all_replicas_share_an_oversubscribed_spine() -> None:
    bytes_PP = np.full((4, 4), 1e9)
    alone, pods = _fabric(2, 2), _fabric(2, 2, pod_nodes=1, oversubscription=4)
    free = exchange_seconds(bytes_PP, 0.0, 1, alone, 0, _random())
    assert free == pytest.approx([2e9 / 40e9])
    assert exchange_seconds(bytes_PP, 0.0, 1, pods, 0, _random()) == pytest.approx(4 * free)


def test_reduction_follows_the_ring() -> None:
    fabric = _fabric(2, 4)
    assert reduce_seconds(40e9, 1, 1, fabric) == 0
    assert reduce_seconds(40e9, 4, 4, fabric) == pytest.approx(0.75 * 40e9 / 360e9)
    assert reduce_seconds(40e9, 4, 1, fabric) == pytest.approx(0.75)
    assert reduce_seconds(40e9, 8, 4, fabric) == pytest.approx(0.875 / 4)  # their ring has all four interfaces


@pytest.mark.parametrize(("zero_stage", "rounds"), [(0, 2), (1, 3), (2, 5)])
def test_gradients_go_around_twice_and_weights_once(zero_stage: int, rounds: int) -> None:
    config = load_config(
        None, ["train.precision=bfloat16", "moe.experts=32", "moe.clusters=4", f"world.zero_stage={zero_stage}"]
    )
    found = _seconds(0.0, Scenario(Strategy.TWO_STAGE), WorldShape(16, 1, 1), config)["reduction"]
    held = sum(parameters_on_rank(config, WorldShape(16, 1, 1), 1000).values())
    assert found == pytest.approx(rounds * reduce_seconds(2 * held, 16, 8, _fabric(2, 8)))


@pytest.mark.parametrize(("zero_stage", "of_matrices", "of_others"), [(0, 8, 4), (1, 6, 6)])
def test_muon_reduces_in_float32_and_broadcasts_weights(zero_stage: int, of_matrices: int, of_others: int) -> None:
    """A dense model: three matrices of width 4 * 64 a layer, and attention's four of 64 x 64; embeddings have AdamW."""
    words = ["model.hidden_size=64", "model.heads=4", "model.layers=2", "moe.kind=dense", "moe.dense_hidden=256"]
    config = load_config(
        None, [*words, "train.precision=bfloat16", "optimizer.kind=muon", f"world.zero_stage={zero_stage}"]
    )
    found = _seconds(0.0, Scenario(Strategy.TWO_STAGE), WorldShape(16, 1, 1), config)["reduction"]
    matrices = 2 * (3 * 64 * 256 + 4 * 64 * 64)
    others = 1000 * 64 + (2 * 2 + 1) * 64
    assert found == pytest.approx(reduce_seconds(of_matrices * matrices + of_others * others, 16, 8, _fabric(2, 8)))


def test_devices_that_take_turns_are_slower_but_wait_less_for_the_busiest() -> None:
    popularity_LE = zipf(32, 1.0, 2, _random())
    alone, shared = (
        step_time(CONFIG, SHAPE, BatchShape(2, 2), 1000, replace(_fabric(2, 8), sharing=n), popularity_LE, TWO).parts
        for n in (1.0, 8.0)
    )
    assert shared["attention and dense"] == pytest.approx(8 * alone["attention and dense"])
    assert alone["experts"] < shared["experts"] < 8 * alone["experts"]


def test_processors_that_move_data_count_all_of_it() -> None:
    bytes_PP = np.full((4, 4), 1e9) * (1 - np.eye(4))
    slow = replace(_fabric(2, 2), device=replace(H100, stack_bandwidth=1e9), sharing=2.0)
    assert exchange_seconds(bytes_PP, 0.0, 1, slow, 0, _random()) == pytest.approx([3 / 0.5])
    assert reduce_seconds(1e9, 2, 1, slow) == pytest.approx(0.5 / 0.5)


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 3), st.integers(0, 99))
def test_balanced_clusters_are_equally_large_and_no_worse(clusters: int, slots: int, skew: float, seed: int) -> None:
    popularity_E = zipf(clusters * slots, skew, 1, np.random.default_rng(seed))[0]
    cluster_E = balanced_clusters(popularity_E, clusters)
    assert np.bincount(cluster_E, minlength=clusters).tolist() == [slots] * clusters
    load_G = np.bincount(cluster_E, weights=popularity_E)
    worst = np.sort(popularity_E)[-slots:].sum()
    assert popularity_E.sum() == pytest.approx(1)
    assert 1 / clusters - 1e-9 <= load_G.max() <= worst + 1e-9


def test_samples_follow_popularity_without_repeating() -> None:
    popularity_E = np.array([0.7, 0.1, 0.1, 0.1])
    choice_SK = sample(popularity_E, 2, _random())
    assert all(len(set(row)) == 2 for row in choice_SK.tolist())
    first = sample(popularity_E, 1, _random())
    assert np.bincount(first.ravel()) / len(first) == pytest.approx(popularity_E, abs=0.03)


def _save(folder: Path, name: str, choices: list[list[int]]) -> None:
    arrays: dict[str, Any] = {name: np.array(choices)}
    np.savez(folder / "routing.npz", **arrays)


def test_a_run_tells_its_popularity(tmp_path: Path) -> None:
    lines = [{"experts": [[9, 9]]}, {"experts": [[3, 1]]}, "broken", {"experts": [[1, 3]]}, {"experts": [[0, 4]]}]
    (tmp_path / "load.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"experts": [[')
    assert recorded(tmp_path, 2)[0] == pytest.approx([1 / 8, 7 / 8])
    with pytest.raises(ConfigError, match="is of 2 experts, the configuration has 4"):
        recorded(tmp_path, 4)
    (tmp_path / "load.jsonl").unlink()
    _save(tmp_path, "layer0.flat", [[0, 1], [0, -1], [0, 3]])
    assert recorded(tmp_path, 4)[0] == pytest.approx([3 / 5, 1 / 5, 0, 1 / 5], abs=1e-6)
    _save(tmp_path, "layer0.one", [[0], [1], [1], [1]])
    assert recorded(tmp_path, 4)[0] == pytest.approx([1 / 8, 1 / 8, 3 / 8, 3 / 8], abs=1e-6)
    (tmp_path / "routing.npz").write_bytes(b"PK broken")
    with pytest.raises(ConfigError, match=r"has no whole load\.jsonl"):
        recorded(tmp_path, 4)


def _seconds(
    skew: float, scenario: Scenario, shape: WorldShape = SHAPE, config: RunConfig = CONFIG
) -> dict[str, float]:
    popularity_LE = zipf(32, skew, 2, _random())
    return step_time(config, shape, BatchShape(2, 2), 1000, _fabric(2, 8), popularity_LE, scenario).parts


def test_skew_costs_and_regrouping_wins_it_back() -> None:
    even, skewed = (_seconds(skew, Scenario(Strategy.TWO_STAGE)) for skew in (0.0, 1.5))
    regrouped = _seconds(1.5, Scenario(Strategy.TWO_STAGE, recluster_every=10))
    assert even["experts"] < regrouped["experts"] < skewed["experts"]
    assert regrouped["re-clustering"] > 0 == skewed["re-clustering"]
    rarely = _seconds(1.5, Scenario(Strategy.TWO_STAGE, recluster_every=20))
    assert rarely["re-clustering"] == pytest.approx(regrouped["re-clustering"] / 2)


def test_overlap_hides_and_offload_costs_what_computation_does_not_hide() -> None:
    plain = _seconds(0.5, Scenario(Strategy.TWO_STAGE))
    assert _seconds(0.5, Scenario(Strategy.TWO_STAGE, overlap=0.75))["all-to-all"] == pytest.approx(
        plain["all-to-all"] / 4
    )
    assert plain["offload"] == 0
    assert _seconds(0.5, Scenario(Strategy.TWO_STAGE, resident=0.0), WorldShape(16, 1, 1))["offload"] > 0


def test_65536_gpus_are_simulated_in_all_ways() -> None:
    config = load_config(
        None,
        [
            "moe.experts=256",
            "moe.clusters=8",
            "moe.top_k=8",
            "world.shard=8",
            "world.shard_mode=experts",
            "train.global_batch_size=65536",
        ],
    )
    fabric = _fabric(8192, 8, oversubscription=2)
    times = compare(
        config, fabric, 1000, skew=0.5, trace=None, most_nodes=4, recluster_every=100, resident=0.5, overlap=0.0
    )
    assert list(times) == ["flat", "node-limited", "two-stage", "+ regrouped", "+ offloaded"]
    for time in times.values():
        assert time.tokens == 65536 * 256
        assert 0 < time.model_flops_utilisation < H100.matmul_share
    assert times["two-stage"].inter_node_bytes_per_token_layer < times["flat"].inter_node_bytes_per_token_layer / 4


def test_seconds_of_attention_are_those_of_the_slowest_link_of_a_group() -> None:
    config = load_config(
        None,
        [
            "moe.kind=dense",
            "model.hidden_size=64",
            "model.layers=3",
            "model.sequence_length=16",
            "train.precision=float32",
            "world.tensor=2",
        ],
    )
    fabric = _fabric(2, 1)
    one = 2 * 16 * 64 * 4 / 2 / fabric.rail_bandwidth  # two sequences of 16 tokens, half of them from the other node
    shape = WorldShape(2, 1, 1, tensor=2)
    assert attention_seconds(config, shape, BatchShape(2, 1), fabric) == pytest.approx((3 + 1) * 5 * one)
    assert attention_seconds(config, WorldShape(2, 1, 1), BatchShape(2, 1), fabric) == 0


def test_a_plan_takes_the_fastest_that_fits_and_says_why() -> None:
    found = plan(CONFIG, _fabric(2, 8), 1000, 0.2)
    timed = [option.time.seconds for option in found.options if option.time]
    assert timed == sorted(timed)
    assert all(option.fits == (option.memory.total <= found.limit) for option in found.options)
    assert "GiB to spare" in found.reason
    load_config(None, ["moe.experts=32", "moe.clusters=4", *found.best.layout.overrides.split()])
    shapes = {layout.shape for layout in layouts(CONFIG, 16, 1000, 8)}
    assert all(shape.ranks == 16 and 4 % shape.cluster == 0 and 8 % shape.shard == 0 for shape in shapes)
    assert {WorldShape(2, 4, 2), WorldShape(4, 2, 1, tensor=2, context=2, pipeline=2)} <= shapes


def test_axes_that_are_set_stay_and_tensor_groups_stay_inside_nodes() -> None:
    kept = load_config(None, ["model.layers=4", "world.tensor=2", "world.pipeline=2", "train.global_batch_size=64"])
    sizes = {(s.tensor, s.context, s.pipeline, s.chunks) for s in (one.shape for one in layouts(kept, 16, 1000, 8))}
    assert sizes == {(2, context, 2, chunks) for context in (1, 2) for chunks in (1, 2)}  # four heads
    free = load_config(None, ["model.heads=16", "train.global_batch_size=64"])
    assert {one.shape.tensor for one in layouts(free, 16, 1000, 4)} == {1, 2, 4}
    assert {one.shape.tensor for one in layouts(free, 16, 1002, 4)} == {1, 2}, "the vocabulary does not divide by four"
    with pytest.raises(ConfigError, match=r"global_batch_size=3 is not divisible by 16 GPUs: use 16, for example, or"):
        list(layouts(load_config(None, ["train.global_batch_size=3", "world.tensor=1"]), 16, 1001, 8))


def test_a_plan_that_cannot_be_says_what_could() -> None:
    large = load_config(
        None,
        ["moe.kind=standard", "moe.experts=64", "model.hidden_size=4096", "moe.expert_hidden=4096", "model.layers=32",
         "model.sequence_length=2048", "train.global_batch_size=64", "train.precision=bfloat16"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^nothing fits 8 GPUs of h100 .* the least is .* GiB.*; 4 nodes would do, "):
        plan(large, _fabric(1, 8), 32000, 0.2)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=64 is not divisible by 24 GPUs: use 72"):
        plan(large, _fabric(3, 8), 32000, 0.2)
    with pytest.raises(ConfigError, match="--gpu 'h1000' is unknown"):
        device_named("h1000")


@pytest.mark.parametrize("counts", ["[[0, 0], [3, 1]]", "[[1, NaN], [3, 1]]", "[[2, -1], [3, 1]]"])
def test_a_trace_without_tokens_is_refused(tmp_path: Path, counts: str) -> None:
    (tmp_path / "load.jsonl").write_text(f'{{"experts": {counts}}}\n')
    with pytest.raises(ConfigError, match=r"--trace \S+: a layer has no token, or counts [^\n]+$"):
        recorded(tmp_path, 2)


@pytest.mark.parametrize(("number", "most"), [(1, 9), (36, 100), (36, 6), (36, 5), (97, 97), (80_000_000_000, 65_536)])
def test_divisors_are_those_of_a_linear_search(number: int, most: int) -> None:
    assert layout_search._divisors(number, most) == [k for k in range(1, min(number, most) + 1) if number % k == 0]


def test_a_batch_beyond_all_machines_is_planned() -> None:
    config = load_config(None, ["train.global_batch_size=80000000000"])
    found = [layout.batch.micro for layout in layouts(config, 8, 1000, 8)]
    assert max(found) <= layout_search.LARGEST_MICRO_BATCH
    assert layout_search._divisors(2**63 - 25) == [1]  # a prime, which nothing may try to find


def test_slices_are_planned_where_no_rank_holds_a_base() -> None:
    """Weights of a base of 3 x 16384 x 524288 numbers are 51.5 GB; with ZeRO over 8 replicas 45 GB more, 76 GB fit."""
    words = ["model.layers=1", "model.hidden_size=16384", "moe.expert_hidden=524288", "moe.experts=4", "moe.clusters=2"]
    words += ["moe.top_k=1", "moe.rank=1", "train.precision=bfloat16", "train.global_batch_size=16"]
    with pytest.raises(ConfigError, match="nothing fits 16 GPUs"):
        plan(load_config(None, words), _fabric(2, 8), 1000, 0.2)
    best = plan(load_config(None, [*words, "world.shard_mode=slice"]), _fabric(2, 8), 1000, 0.2).options[0]
    assert best.fits
    assert best.layout.shape.sliced
    assert "world.shard_mode=slice" in best.layout.overrides
