"""Runs whose attention is divided over ranks: sizes, a standard warm-up, and what is refused."""

import json
from pathlib import Path

import pytest

from moe_dist.config import BatchShape, WorldConfig, WorldShape, load_config
from moe_dist.distributed.init import init_distributed
from moe_dist.distributed.links import Links
from moe_dist.distributed.mesh import Mesh
from moe_dist.errors import ConfigError
from moe_dist.evaluation.trained_model import evaluation_config
from moe_dist.model.language_model import LanguageModel
from moe_dist.model.parameter_counts import count_parameters
from moe_dist.moe.parameter_class import ParameterClass, class_of
from moe_dist.simulator.memory import memory_of_rank
from moe_dist.simulator.sizes import parameters_on_rank
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import SMOKE

SHAPE, VOCABULARY = WorldShape(1, 2, 1, tensor=2), 96
SMALL = ["model.hidden_size=32", "model.heads=4", "moe.experts=16", "moe.clusters=4", "moe.expert_hidden=48"]
KINDS = [
    ["moe.kind=clustered", "model.qk_norm=head"],
    ["moe.kind=standard", "model.kv_heads=2", "model.tie_embeddings=false", "model.qkv_bias=true"],
]


def _held(words: list[str]) -> tuple[dict[ParameterClass, int], int]:
    config = load_config(None, [*SMALL, *words, "world.tensor=2"])
    process = init_distributed(config.world)
    model = LanguageModel(config, VOCABULARY, Mesh.create(SHAPE, process.timeout), Links.discover(process.device))
    held = dict.fromkeys(ParameterClass, 0)
    for parameter in model.parameters():
        held[class_of(parameter)] += parameter.numel()
    return held, count_parameters(model).total


@pytest.mark.parametrize("words", KINDS, ids=" ".join)
def test_a_rank_holds_its_share_of_attention_and_embeddings(words: list[str]) -> None:
    config = load_config(None, [*SMALL, *words])
    alone = sum(parameters_on_rank(config, WorldShape(1, 1, 1), VOCABULARY).values())
    for held, total in run_ranks(_held, 2, words):
        assert held == parameters_on_rank(config, SHAPE, VOCABULARY)
        assert held[ParameterClass.TENSOR] > held[ParameterClass.DENSE]
        assert total == alone


def test_memory_of_a_rank_falls_with_tensor_and_context() -> None:
    config, batch = load_config(None, SMALL), BatchShape(2, 1)
    plain, tensor, context = (
        memory_of_rank(config, shape, batch, VOCABULARY)
        for shape in (WorldShape(1, 4, 1), WorldShape(1, 4, 1, tensor=2), WorldShape(1, 4, 1, context=2))
    )
    assert tensor.activations == context.activations == plain.activations / 2
    assert tensor.output_layer == context.output_layer == plain.output_layer / 2
    assert plain.dense_weights / 2 < tensor.dense_weights < plain.dense_weights == context.dense_weights


@pytest.mark.slow
def test_a_warm_up_of_standard_experts_ends_alike(tmp_path: Path) -> None:
    losses = []
    for name, layout in (("whole", []), ("divided", ["world.tensor=2"])):
        words = [f"name={name}", f"runs_dir={tmp_path}/runs", f"corpus.cache_dir={tmp_path}/cache", "train.steps=4"]
        more = ["tensorboard=false", "moe.warmup_standard=0.5", "moe.wire_dtype=float32", "train.eval_every=2"]
        run_ranks(_train, 2, [*words, *more, *layout])
        lines = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line[part]["loss"] for line in lines for part in ("train", "validation") if part in line])
    assert len(losses[0]) == 4 + 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["model.heads=6", "world.tensor=4"], r"model\.heads=6 is not divisible by world\.tensor=4 x world\.context=1"),
        (["model.kv_heads=1", "world.tensor=2"], r"model\.kv_heads=1 is not divisible by world\.tensor=2"),
        (["world.context=8"], r"model\.heads=4 is not divisible by world\.tensor=1 x world\.context=8"),
        (["model.qk_norm=width", "world.tensor=2"], r"model\.qk_norm=width does not work with world\.tensor=2"),
    ],
)
def test_what_does_not_divide_is_refused_before_any_rank_starts(words: list[str], refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        load_config(None, ["model.hidden_size=48", "model.heads=4", *words])


def test_an_evaluation_divides_texts_and_not_sequences() -> None:
    config = load_config(None, SMALL)
    with pytest.raises(ConfigError, match=r"world\.tensor=2 x world\.context=1 x .* an evaluation divides texts"):
        evaluation_config(config, WorldConfig(tensor=2), "float32", config.memory)
