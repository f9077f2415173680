"""Imported models compute what transformers computes; what cannot be imported leaves nothing behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_dist.config import load_config
from moe_dist.errors import CheckpointError, ConfigError, MoeDistError
from moe_dist.integrations.huggingface.expert_budget import words_within_budget
from moe_dist.integrations.huggingface.families import family_of
from moe_dist.integrations.huggingface.import_model import help_import, import_model
from moe_dist.integrations.huggingface.import_spec import ImportOptions
from moe_dist.integrations.huggingface.layer_store import LayerStore
from moe_dist.integrations.huggingface.source_folder import SourceFolder
from tests.distributed.ranks import run_ranks
from tests.unit.data.samples import documents_of

pytest.importorskip("transformers", reason="needs moe-dist[models]")

from tests.unit.integrations.published import MODELS, our_logits, published, relative, their_logits


def _import(source: Path, target: Path, *words: str, noise: float = 0.0) -> Path:
    import_model(source, target, words, ImportOptions(noise=noise))
    return target


def test_every_family_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    expected, runs = {}, []
    for number, name in enumerate(MODELS):
        expected[name] = their_logits(published(tmp_path / f"hf-{number}", name))
        runs.append(_import(tmp_path / f"hf-{number}", tmp_path / f"run-{number}"))
    (found,) = run_ranks(our_logits, 1, runs)
    errors = {name: relative(ours, expected[name]) for name, ours in zip(MODELS, found, strict=True)}
    assert max(errors.values()) < 1e-4, errors


UPCYCLED = [
    ["moe.kind=clustered", "moe.experts=8", "moe.clusters=2", "moe.rank=3"],
    ["moe.kind=clustered", "moe.experts=8", "moe.clusters=4", "moe.top_clusters=2", "moe.expert_vectors=false"],
    ["moe.kind=clustered", "moe.experts=6", "moe.clusters=2", "moe.top_k=1"],
    ["moe.kind=standard", "moe.experts=4", "moe.top_k=2"],
]


def test_an_upcycled_model_is_the_same_function(tmp_path: Path) -> None:
    expected = their_logits(published(tmp_path / "hf", "Qwen2"))
    runs = [_import(tmp_path / "hf", tmp_path / f"run-{number}", *words) for number, words in enumerate(UPCYCLED)]
    runs.append(_import(tmp_path / "hf", tmp_path / "noisy", *UPCYCLED[-1], noise=0.05))
    (found,) = run_ranks(our_logits, 1, runs)
    for words, ours in zip(UPCYCLED, found[:-1], strict=True):
        assert relative(ours, expected) < 1e-5, words
    assert 1e-3 < relative(found[-1], expected) < 0.5, "copies with noise are near"


def _compress_and_compare(source: Path, cases: dict[Path, list[str]]) -> tuple[list[Any], list[Tensor]]:
    text = source.parent / "text.txt"
    text.write_text("".join(documents_of(3, 60)))
    options = ImportOptions(text=(str(text),), tokens=2048)
    errors = [import_model(source, run, words, options).output_errors for run, words in cases.items()]
    return errors, our_logits(list(cases))


@pytest.mark.parametrize("name", ["Mixtral", "OLMoE", "Qwen2-MoE", "DeepSeek-V2", "DeepSeek-V3 ungrouped"])
def test_the_error_of_a_compressed_mixture_falls_with_the_rank(tmp_path: Path, name: str) -> None:
    """In one cluster routing is that of the mixture, so that a full rank leaves no error at all."""
    expected = their_logits(published(tmp_path / "hf", name))
    width = 24 if name in ("Mixtral", "OLMoE") else 16
    words = ["moe.kind=clustered", "moe.clusters=1", "moe.backend=masked"]
    ranks = (1, width // 2, width)
    cases = {tmp_path / f"rank-{rank}": [*words, f"moe.rank={rank}"] for rank in ranks}
    cases[tmp_path / "shared"] = [*words, f"moe.rank={width}", "moe.base=shared+cluster", "moe.base_rank=3"]
    cases[tmp_path / "two"] = ["moe.kind=clustered", "moe.clusters=2", f"moe.rank={width}"]
    ((errors, logits),) = run_ranks(_compress_and_compare, 1, tmp_path / "hf", cases)
    means = [sum(map(sum, layers)) / (8 * len(layers)) for layers in errors]
    found = [relative(ours, expected) for ours in logits]
    assert means[0] > 1.5 * means[1] > 1000 * means[2], means
    assert min(found[:2]) > 100 * found[2], found
    assert found[2] < 1e-4, found
    assert found[3] < 1e-4, "a base of two levels and residuals of full rank are exact too"
    assert means[4] < 1e-4, "two clusters compute each expert exactly; tokens choose within one of them"
    assert bool(logits[4].isfinite().all())


class Killed(BaseException):
    """End of the process, as far as files are concerned."""


def _import_in_parts(source: Path, folder: Path) -> list[int]:
    """Import alone, and again after another process was killed at its second layer; what it compressed."""
    text = folder / "text.txt"
    text.write_text("".join(documents_of(3, 60)))
    wanted = ["moe.kind=clustered", "moe.clusters=2", "moe.rank=3"], ImportOptions(text=(str(text),), tokens=512)
    alone = import_model(source, folder / "alone", *wanted)
    write, written = LayerStore.write, list[int]()

    def limited(self: LayerStore, layer: int, *others: Any) -> None:
        if written == [0]:
            raise Killed
        recorded(self, layer, *others)

    def recorded(self: LayerStore, layer: int, *others: Any) -> None:
        written.append(layer)
        write(self, layer, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerStore, "write", limited)
        with pytest.raises(Killed):
            help_import(source, folder / "run", *wanted)
        written.clear()
        patch.setattr(LayerStore, "write", recorded)
        assert import_model(source, folder / "run", *wanted).output_errors == alone.output_errors
        help_import(source, folder / "run", *wanted)  # comes too late
    return written


def test_processes_share_the_layers_of_a_compression(tmp_path: Path) -> None:
    published(tmp_path / "hf", "Mixtral")
    (written,) = run_ranks(_import_in_parts, 1, tmp_path / "hf", tmp_path)
    assert written == [1]
    files = [sorted((tmp_path / name / "final").glob("*.safetensors")) for name in ("alone", "run")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]] != []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "hf", "run", "text.txt"]


def test_sharded_files_give_the_same_run(tmp_path: Path) -> None:
    model = published(tmp_path / "whole", "Mixtral")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sharded" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    weights = [
        {
            file.name: load_file(file)
            for file in sorted((_import(tmp_path / name, tmp_path / f"run-{name}") / "final").glob("*.safetensors"))
        }
        for name in ("whole", "sharded")
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    shard = next((tmp_path / "sharded").glob("*.safetensors"))
    shard.unlink()
    _refused(tmp_path, "sharded", CheckpointError, rf"{shard.name} of model.safetensors.index.json is missing")


def _refused(folder: Path, name: str, error: type[MoeDistError], match: str, *words: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=match) as caught:
        _import(folder / name, folder / "refused", *words)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before, "nothing half-written is left"


def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path: Path) -> None:
    published(tmp_path / "hf", "Llama")
    config, weights = tmp_path / "hf" / "config.json", tmp_path / "hf" / "model.safetensors"
    keys, tensors = json.loads(config.read_text()), load_file(weights)

    def with_keys(**changes: object) -> None:
        config.write_text(json.dumps(keys | changes))

    with_keys(architectures=["GPT2LMHeadModel"], model_type="gpt2")
    _refused(tmp_path, "hf", ConfigError, "'GPT2LMHeadModel' is not supported: known are LlamaForCausalLM, Mistral.*")
    with_keys(hidden_act="gelu")
    _refused(tmp_path, "hf", ConfigError, "hidden_act='gelu' of a LlamaForCausalLM is not supported: only 'silu'")
    with_keys(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    _refused(tmp_path, "hf", ConfigError, "rope_type='dynamic' is not supported: known are default, linear, llama.*")
    with_keys(intermediate_size=40)
    _refused(tmp_path, "hf", CheckpointError, r"gate_proj.weight has shape \(24, 32\), config.json needs \(40, 32\)")
    with_keys(vocab_size=290)
    _refused(tmp_path, "hf", ConfigError, "tokenizer.vocab_size=290 has no room for the 300 ids")
    with_keys(quantization_config={"quant_method": "fp8"})
    _refused(tmp_path, "hf", MoeDistError, "quantized")
    with_keys()
    _refused(tmp_path, "hf", ConfigError, "model.hidden_size=64 is not that of the model, 32", "model.hidden_size=64")
    _refused(tmp_path, "hf", ConfigError, "unknown key 'moe.rnk'", "moe.rnk=2")
    save_file({name: value for name, value in tensors.items() if name != "model.norm.weight"}, weights)
    _refused(tmp_path, "hf", CheckpointError, r"has no tensor model.norm.weight, which config.json needs")
    weights.write_bytes(b"not safetensors")
    _refused(tmp_path, "hf", CheckpointError, r"model.safetensors cannot be read")
    weights.unlink()
    _refused(tmp_path, "hf", CheckpointError, r"has neither model.safetensors nor model.safetensors.index.json")
    _refused(tmp_path, "none", CheckpointError, r"config.json cannot be read")
    _refused(tmp_path, "none.gguf", CheckpointError, r"none.gguf does not exist")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_dist.integrations.huggingface import write_run

    published(tmp_path / "hf", "Llama")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_run, "write_checkpoint", full)
    _refused(tmp_path, "hf", CheckpointError, "cannot be written: No space left on device")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    _refused(tmp_path, "hf", CheckpointError, "has no space for .* bytes: 10 are free")


def test_an_existing_run_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match="run exists already"):
        _import(tmp_path / "hf", tmp_path / "run")


def test_a_name_on_the_hub_is_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cached = tmp_path / "cache" / "models--someone--tiny"
    model = published(cached / "snapshots" / "abc", "Llama")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run = _import(Path("someone/tiny"), tmp_path / "run")
    (found,) = run_ranks(our_logits, 1, [run])
    assert relative(found[0], their_logits(model)) < 1e-4
    with pytest.raises(CheckpointError, match="someone/other is no folder, and the Hugging Face") as caught:
        _import(Path("someone/other"), tmp_path / "other")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_share_of_the_experts_parameters_chooses_the_rank(tmp_path: Path) -> None:
    """Of 8 experts of 3 x 32 x 24: one base, and for each expert 168 a rank and 104 of its vectors."""
    published(tmp_path / "hf", "Mixtral")
    checkpoint = SourceFolder(tmp_path / "hf")
    for keep, words, rank in ((0.5, [], 4), (0.5, ["moe.clusters=2", "moe.expert_vectors=false"], 3), (1.0, [], 11)):
        plain = load_config(None, (), family_of(checkpoint.hf).sections(checkpoint.hf))
        chosen = load_config(None, words_within_budget(plain, words, keep), plain.model_dump())
        assert (chosen.moe.kind, chosen.moe.rank, chosen.moe.top_k) == ("clustered", rank, 2)
        clusters, vectors = chosen.moe.clusters, 104 * chosen.moe.expert_vectors
        sizes = [clusters * 2304 + 8 * (168 * one + vectors) for one in (rank, rank + 1)]
        assert sizes[0] <= keep * 8 * 2304 < sizes[1]
    for words, keep, match in (
        (["moe.rank=3"], 0.5, "--keep 0.5 chooses moe.rank: leave one of them out"),
        (["moe.clusters=8", "moe.top_k=1"], 0.5, "--keep 0.5 is 9,216 parameters of a layer, but moe.clusters=8 bases"),
    ):
        with pytest.raises(ConfigError, match=match):
            words_within_budget(plain, words, keep)
