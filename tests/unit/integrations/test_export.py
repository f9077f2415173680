"""Exported runs compute in transformers what our model computes, and come back unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.data import open_tokenizer, tokenizer_in
from moe_dist.errors import CheckpointError
from moe_dist.integrations.huggingface.export_model import ExportedModel, export_model
from moe_dist.integrations.huggingface.import_model import import_model
from moe_dist.integrations.huggingface.import_spec import ImportOptions
from tests.distributed.ranks import run_ranks

pytest.importorskip("transformers", reason="needs moe-dist[models]")

import transformers

from tests.unit.integrations.published import MODELS, TOKENS_BS, published, relative, their_logits
from tests.unit.integrations.random_runs import LATENT, random_runs

OURS = "MoeDistForCausalLM"
STANDARD = ["moe.kind=standard", "moe.balance=aux_loss"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "dense": ("LlamaForCausalLM", ["moe.kind=dense", "moe.dense_hidden=20"]),
    "dense, norms of all heads": (OURS, ["moe.kind=dense", "model.qk_norm=width", "model.qkv_bias=true"]),
    "dense, norms of each head": ("Qwen3ForCausalLM", ["moe.kind=dense", "model.qk_norm=head", "model.head_dim=6"]),
    "standard": ("MixtralForCausalLM", STANDARD),
    "standard, one expert": ("OlmoeForCausalLM", [*STANDARD, "moe.top_k=1", "model.qk_norm=width"]),
    "standard, biases": (OURS, ["moe.kind=standard"]),
    "standard, scaled": (OURS, [*STANDARD, "moe.gate_scale=2", "moe.normalize_gates=false"]),
    "standard, shared": (OURS, [*STANDARD, "moe.shared_expert_hidden=12", "model.qk_norm=head"]),
    "clustered": (OURS, ["model.tie_embeddings=false"]),
    "clustered, one expert": (OURS, ["moe.top_k=1", "moe.expert_vectors=false", "moe.gate_scale=2"]),
    "clustered, two clusters": (OURS, ["moe.clusters=4", "moe.top_clusters=2", "moe.normalize_gates=false"]),
    "clustered, one base": (OURS, ["moe.base=shared+cluster", "moe.base_rank=4", "model.qkv_bias=true"]),
    "standard, groups of sigmoids": (
        OURS, ["moe.kind=standard", "moe.score=sigmoid", "moe.groups=4", "moe.top_groups=2", "model.qkv_bias=true"],
    ),
    "clustered, latent attention": (OURS, [*LATENT, "moe.score=sigmoid", "moe.dense_layers=1", "moe.dense_hidden=20"]),
    "clustered, window": (OURS, ["model.window=6"]),
    "clustered, shared": (
        OURS, ["moe.shared_expert_hidden=12", "moe.shared_expert_gate=true", "model.qk_norm=width"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Runs of all kinds, and our logits."""
    folder = tmp_path_factory.mktemp("runs")
    paths = {name: folder / f"run-{number}" for number, name in enumerate(KINDS)}
    (found,) = run_ranks(random_runs, 1, {paths[name]: words for name, (_, words) in KINDS.items()})
    return {name: (paths[name], logits) for name, logits in zip(KINDS, found, strict=True)}


def _export(run: Path, target: Path, dtype: torch.dtype | None = None, **options: Any) -> ExportedModel:
    path = tokenizer_in(run)
    assert path is not None
    return export_model(find_weights(run), open_tokenizer(path), target, dtype, **options)


def _load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def _weights(run: Path) -> dict[str, Tensor]:
    files = sorted((run / "final").glob("*.safetensors"))
    return {
        name: value
        for file in files
        for name, value in load_file(file).items()
        if name.startswith("weight/") or (name.startswith("part/balance/") and value.any())
    }


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_run_is_the_same_function_and_comes_back(
    runs: dict[str, tuple[Path, Tensor]], name: str, tmp_path: Path
) -> None:
    run, logits = runs[name]
    done = _export(run, tmp_path / "hf", largest_file=20_000)
    assert done.architecture == KINDS[name][0]
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    model = _load(tmp_path / "hf")
    assert type(model).__name__ == KINDS[name][0]
    assert relative(their_logits(model), logits) < 1e-5
    import_model(tmp_path / "hf", tmp_path / "again", [], ImportOptions())
    torch.testing.assert_close(_weights(tmp_path / "again"), _weights(run), rtol=0, atol=0)
    before, after = find_weights(run), find_weights(tmp_path / "again")
    assert [record.members for record in before.manifest.placements] == [r.members for r in after.manifest.placements]


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_goes_in_and_out_without_a_change(tmp_path: Path, name: str) -> None:
    model = published(tmp_path / "hf", name)
    import_model(tmp_path / "hf", tmp_path / "run", [], ImportOptions())
    done = _export(tmp_path / "run", tmp_path / "out")
    expected = "LlamaForCausalLM" if name == "Mistral" else type(model).__name__
    assert done.architecture == expected
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(their_logits(_load(tmp_path / "out")), their_logits(model), rtol=1e-6, atol=1e-6)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


FORMATS = [[], ["precision.bits=8", "precision.symmetric=false", "precision.group_size=32"]]


@pytest.mark.parametrize("precision", FORMATS)
def test_factors_stay_packed(tmp_path: Path, precision: list[str]) -> None:
    words = ["precision.residuals=qat", "moe.expert_hidden=80", *precision]
    (logits,) = run_ranks(random_runs, 1, {tmp_path / "run": words})[0]
    done, plain = (
        _export(tmp_path / "run", tmp_path / "hf", quantized=True),
        _export(tmp_path / "run", tmp_path / "plain"),
    )
    assert done.nbytes < plain.nbytes
    model = _load(tmp_path / "hf", dtype=torch.float32)
    expert = model.model.layers[0].mlp.expert["0"]
    assert expert.in_u_DR.codes.dtype == torch.uint8
    assert relative(their_logits(model), logits) < 1e-5, "qat computes with the stored numbers"
    import_model(tmp_path / "hf", tmp_path / "again", [], ImportOptions())
    unpacked = _weights(tmp_path / "again")["weight/gpt.decoder.layers.0.mlp.inner.expert.0.in_u_DR@0"]
    assert torch.equal(unpacked.view(32, 6), expert.in_u_DR.unpacked(torch.float32))


def test_bfloat16_is_the_rounded_model(runs: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    run, logits = runs["clustered"]
    _export(run, tmp_path / "hf", torch.bfloat16)
    model = _load(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.expert_bias_E.dtype == torch.float32
    error = (their_logits(model.float()) - logits).abs().mean() / logits.abs().mean()
    assert float(error) < 0.1


def test_what_cannot_be_exported_is_refused(runs: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    run, _ = runs["dense"]
    with pytest.raises(CheckpointError, match="only clustered experts can be quantized"):
        _export(run, tmp_path / "hf", quantized=True)
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="taken exists already"):
        _export(run, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    _export(runs["clustered"][0], tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"moe_dist": 3}))
    with pytest.raises(CheckpointError, match="moe_dist must hold the sections"):
        import_model(tmp_path / "hf", tmp_path / "again", [], ImportOptions())


@torch.no_grad()
@pytest.mark.parametrize("name", ["clustered", "clustered, two clusters", "standard, biases"])
def test_generation_with_cache_padding_and_batches(
    runs: dict[str, tuple[Path, Tensor]], name: str, tmp_path: Path
) -> None:
    _export(runs[name][0], tmp_path / "hf")
    model = _load(tmp_path / "hf")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cached = model.generate(TOKENS_BS[:, :9], **options)
    assert torch.equal(cached, model.generate(TOKENS_BS[:, :9], use_cache=False, **options))
    short = model.generate(TOKENS_BS[:1, 3:9], **options)
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), TOKENS_BS[:1, 3:9]], dim=1)
    both = torch.cat([padded, TOKENS_BS[1:, :9]])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    batched = model.generate(both, attention_mask=mask, **options)
    assert torch.equal(batched[0, 3:], short[0])
    assert torch.equal(batched[1], cached[1])
