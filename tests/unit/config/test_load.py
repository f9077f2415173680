"""Where a value comes from, what is refused, and what the refusal says."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config import RunConfig, dump_config, load_config, resolve_world
from moe_dist.errors import ConfigError, MoeDistError

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_file


def refusal(path: Path | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.exit_code == 2
    return line


def test_later_sources_win_key_by_key(write: Write) -> None:
    write("base.yaml", "train: {steps: 100, log_every: 3, warmup_steps: 5}\nseed: 1\n")
    write("second.yaml", "train: {log_every: 4}\n")
    path = write("run.yaml", "include: [base.yaml, second.yaml]\ntrain: {warmup_steps: 6}\n")
    config = load_config(path, ["seed=2", "train.eval_every=9", "seed=3"])
    assert config.train.global_batch_size == RunConfig().train.global_batch_size  # a default
    assert config.train.steps == 100  # an included file
    assert config.train.log_every == 4  # the later one of two
    assert config.train.warmup_steps == 6  # the file itself
    assert (config.seed, config.train.eval_every) == (3, 9)  # the last word


def test_includes_are_found_beside_the_file_and_nest(write: Write, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write("model/tiny.yaml", "include: [../base.yaml]\nmodel: {layers: 1}\n")
    write("base.yaml", "model: {layers: 9, heads: 2}\n")
    config = load_config(write("run.yaml", "include: [model/tiny.yaml]\n"))
    assert (config.model.layers, config.model.heads) == (1, 2)


def test_a_circle_of_includes_is_refused(write: Write) -> None:
    write("a.yaml", "include: [b.yaml]\n")
    assert "includes itself" in refusal(write("b.yaml", "include: [a.yaml]\n"))


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("moe.experts=abc", "moe.experts='abc' must be a whole number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast' must be a number"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate='nan' must be a finite number"),
        ("tensorboard=maybe", "tensorboard='maybe' must be true or false"),
        ("moe.kind=foo", "moe.kind='foo' must be 'clustered', 'standard' or 'dense'"),
        ("moe.overlap_chunks=x", "moe.overlap_chunks='x' must be a whole number or 'auto'"),
        ("moe.overlap_chunks=0", "moe.overlap_chunks=0 must be >= 1 or 'auto'"),
        ("corpus.paths=3", "corpus.paths=3 must be a list"),
        ("corpus.sources={a: 3}", "corpus.sources.a=3 must be a section of keys"),
        ("name=a/b", "name='a/b' must be letters and digits, and after the first of them also . _ -"),
        ("model.rope_scaling={a: 1}", "model.rope_scaling.kind: is missing"),
    ],
)
def test_a_wrong_value_is_told_what_it_must_be(word: str, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [word])
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {stps: 3}", ["'train.stps'", "'train.steps'"]),
        ("steps: 3", ["'steps'", "'train.steps'"]),
        ("moe: {expert: 3}", ["'moe.expert'", "'moe.experts'"]),
        ("modle: {}", ["'modle'", "'model'"]),
        ("- 1", ["must hold"]),
        ("a: [", ["not valid YAML"]),
        ("include: base.yaml", ["`include`", "'base.yaml'"]),
        ("train: 3", ["train=3"]),
        ("moe: {rank: 2}\nmodel: {}\nmoe: {top_k: 1}", ["'moe' comes twice", "line 3"]),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_line(write: Write, text: str, parts: list[str]) -> None:
    line = refusal(write("run.yaml", text))
    for part in parts:
        assert part in line


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    assert "nowhere.yaml: cannot be read" in refusal(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "not UTF-8" in refusal(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["moe.experts=30"], ["moe.experts=30", "moe.clusters=4"]),
        (["moe.top_k=9"], ["moe.top_k=9", "moe.experts=32", "moe.clusters=4", "8 experts"]),
        (["moe.top_clusters=5"], ["moe.top_clusters=5", "moe.clusters=4"]),
        (["moe.kind=standard", "moe.top_k=33"], ["moe.top_k=33", "moe.experts=32"]),
        (["moe.shared_expert_gate=true"], ["moe.shared_expert_gate=true", "moe.shared_expert_hidden"]),
        (["world.cluster=3"], ["moe.clusters=4", "world.cluster=3"]),
        (["world.shard=3", "world.shard_mode=experts"], ["moe.experts=32", "world.shard=3"]),
        (["moe.kind=standard", "world.cluster=5"], ["moe.experts=32", "world.cluster=5"]),
        (["recluster.period=0"], ["recluster.period=0"]),
        (["recluster.period=400"], ["recluster.period=400", "train.steps=400"]),
        (["recluster.period=20", "recluster.start=500"], ["recluster.start=500", "train.steps=400"]),
        (["recluster.period=20", "recluster.start=50", "recluster.stop=40"], ["recluster.stop=40"]),
        (["recluster.alpha=1.5"], ["recluster.alpha=1.5"]),
        (["recluster.max_moved=0"], ["recluster.max_moved=0"]),
        (
            ["memory.device_budget_bytes=1e300"],
            ["memory.device_budget_bytes", "must be <= 1000000000000000000"],
        ),
        (["memory.device_budget_bytes=1.5"], ["memory.device_budget_bytes=1.5 must be a whole number"]),
        (["memory.device_budget_ratio=0"], ["memory.device_budget_ratio=0", "must be > 0"]),
        (
            ["memory.device_budget_bytes=2e9", "memory.device_budget_ratio=0.5"],
            ["memory.device_budget_bytes=2000000000", "memory.device_budget_ratio=0.5", "null"],
        ),
        (["memory.host_budget=2000000000000000000"], ["memory.host_budget=2000000000000000000", "must be <="]),
        (["recluster.period=20", "recluster.max_moved=0.06"], ["recluster.max_moved=0.06", "moe.experts=32", "0.0625"]),
        (["recluster.period=20", "moe.clusters=32", "moe.top_k=1"], ["recluster.period=20", "moe.clusters=32"]),
        (["recluster.period=20", "moe.kind=standard"], ["recluster.period=20", "standard"]),
        (["moe.warmup_standard=1"], ["moe.warmup_standard=1"]),
        (["moe.warmup_standard=0.5", "moe.kind=dense"], ["moe.warmup_standard=0.5", "moe.kind=clustered", "dense"]),
        (["moe.warmup_standard=0.001"], ["moe.warmup_standard=0.001", "train.steps=400", "0 steps"]),
        (["moe.warmup_standard=0.5", "moe.rank=200"], ["moe.rank=200", "model.hidden_size=128", "at most 128"]),
        (["recluster.transition=refit", "moe.rank=200"], ["moe.rank=200", "recluster.transition=refit"]),
        (["world.zero_stage=3"], ["world.zero_stage=3", "0, 1 or 2"]),
        (["model.hidden_size=130"], ["model.hidden_size=130", "model.heads=4"]),
        (["model.heads=4", "model.kv_heads=3"], ["model.heads=4", "model.kv_heads=3"]),
        (["model.hidden_size=20"], ["model.hidden_size=20", "model.heads=4", "even"]),
        (["train.warmup_steps=400"], ["train.warmup_steps=400", "train.steps=400"]),
        (["train.micro_batch_size=5"], ["train.global_batch_size=32", "train.micro_batch_size=5"]),
        (["corpus.kind=text"], ["corpus.kind=text", "corpus.paths"]),
        (["corpus.kind=hub"], ["corpus.kind=hub", "corpus.name"]),
        (["corpus.kind=stdlib", "corpus.paths=[a.txt]"], ["corpus.kind=stdlib", "corpus.paths=['a.txt']"]),
        (["corpus.validation_paths=[b.txt]"], ["corpus.kind=stdlib", "corpus.validation_paths=['b.txt']"]),
        (["corpus.kind=stdlib", "corpus.name=a/b"], ["corpus.kind=stdlib", "corpus.name='a/b'"]),
        (["optimizer.beta1=1"], ["optimizer.beta1=1 must be < 1"]),
        (["optimizer.beta2=1.0"], ["optimizer.beta2=1.0 must be < 1"]),
        (["train.steps=0"], ["train.steps=0"]),
        (["train.steps=many"], ["train.steps='many'"]),
        (["train.steps=true"], ["train.steps=True: a truth value"]),
        (["recluster.period=false"], ["recluster.period=False: a truth value"]),
        (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate"]),
        (["name=../elsewhere"], ["name='../elsewhere'"]),
        (["moe.kind=sparse"], ["moe.kind='sparse'", "clustered"]),
        (["train.steps"], ["'train.steps'", "key.sub=value"]),
        (["train..steps=3"], ["key.sub=value"]),
        (["train.steps=[1"], ["train.steps", "'[1'"]),
        (["train.stepz=3"], ["'train.stepz'", "'train.steps'"]),
    ],
)
def test_each_refusal_names_keys_and_values(words: list[str], parts: list[str]) -> None:
    line = refusal(None, *words)
    for part in parts:
        assert part in line


def test_a_config_error_is_an_error_for_the_user() -> None:
    assert issubclass(ConfigError, MoeDistError)


@given(
    st.integers(0, 2**31),
    st.sampled_from(["clustered", "standard", "dense"]),
    st.floats(1e-6, 1.0),
    st.lists(st.text(st.characters(exclude_categories=["C"])), min_size=1),
)
def test_what_is_dumped_is_read_back_equal(seed: int, kind: str, rate: float, paths: list[str]) -> None:
    corpus = {"kind": "text", "paths": paths, "name": paths[0]}
    config = RunConfig.model_validate(
        {"seed": seed, "moe": {"kind": kind}, "optimizer": {"learning_rate": rate}, "corpus": corpus}
    )
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


def test_a_dumped_file_loads(write: Write) -> None:
    config = load_config(None, ["train.steps=77", "world.cluster=2"])
    assert load_config(write("resolved.yaml", dump_config(config))) == config


def test_where_a_summary_was_copied_is_not_kept() -> None:
    """Else to run a run folder's config.yaml again would overwrite the earlier figures."""
    assert "summary_copy" not in dump_config(load_config(None, ["summary_copy=figures.json"]))


def test_a_standard_warmup_changes_nothing_but_the_kind_of_experts() -> None:
    words = ["moe.warmup_standard=0.25", "train.steps=10", "train.warmup_steps=1"]
    config = load_config(None, [*words, "recluster.period=2", "recluster.start=5"])
    assert config.standard_steps == 2
    first = config.phase_after(1)
    assert (first.moe.kind, first.standard_steps, first.recluster.period) == ("standard", 0, None)
    assert first.model_copy(update={"moe": config.moe, "recluster": config.recluster}) == config
    assert config.phase_after(2) is config
    plain = load_config(None)
    assert plain.standard_steps == 0
    assert plain.phase_after(0) is plain


def test_factors_in_few_bits_are_refused_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match=r"precision\.residuals=qat works with moe\.kind=clustered only, not dense"):
        load_config(None, ["moe.kind=dense", "precision.residuals=qat"])
    with pytest.raises(ConfigError, match=r"precision\.group_size=48 must be 32, 64 or 128"):
        load_config(None, ["precision.group_size=48"])
    with pytest.raises(ConfigError, match=r"precision\.bits=3 must be 4 or 8"):
        load_config(None, ["precision.bits=3"])


@pytest.mark.parametrize(
    "words",
    [
        ["recluster.period=2"],
        ["moe.warmup_standard=0.5"],
        ["moe.base=shared+cluster"],
        ["memory.offload=true"],
        ["precision.residuals=packed"],
        ["precision.group_size=128", "precision.residuals=qat"],
    ],
    ids=str,
)
def test_what_slices_cannot_do_is_refused_in_one_line(words: list[str]) -> None:
    sliced = ["world.shard=2", "world.shard_mode=slice", "moe.expert_hidden=128"]
    assert resolve_world(load_config(None, sliced), 4).sliced
    assert not resolve_world(load_config(None, [*sliced, "moe.kind=standard"]), 4).sliced
    with pytest.raises(
        ConfigError, match=rf"{re.escape(words[0])} does not work with world\.shard_mode=slice: set it to"
    ):
        load_config(None, [*sliced, *words])
    with pytest.raises(ConfigError, match=r"moe\.expert_hidden=129 cannot be divided into world\.shard=2 slices"):
        load_config(None, [*sliced, "moe.expert_hidden=129"])


@pytest.mark.parametrize("words", ["memory.offload=true", "precision.symmetric=false", "train.precision=float16"])
def test_what_packed_factors_cannot_do_is_refused_in_one_line(words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{words} does not work with precision\.residuals=packed: set it to \w+"):
        load_config(None, ["precision.residuals=packed", words])


def test_a_standard_warm_up_stores_nothing_in_few_bits() -> None:
    config = load_config(None, ["precision.residuals=qat", "moe.warmup_standard=0.5"])
    assert config.phase_after(0).precision.residuals == "none"
    assert config.phase_after(config.standard_steps).precision.residuals == "qat"
    RunConfig.model_validate(config.phase_after(0).model_dump())  # as a checkpoint of that phase is read


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: 2026-13-45", ["'2026-13-45' on line 1", "timestamp", "quote it"]),
        ("seed: 0b_", ["'0b_' on line 1", "int", "quote it"]),
        ("seed: " + "9" * 5000, ["'999", "on line 1", "quote it"]),
        ("name: !!timestamp soon", ["'soon' on line 1", "timestamp"]),
        ("seed: !!bool maybe", ["'maybe' on line 1", "bool"]),
        ("seed: 1\n? [a, b]\n: 2", ["key on line 2", "list or a mapping"]),
        ("moe: " + "[" * 5000, ["nested too deeply"]),
        ("moe: &a [*a]", ["moe=[[", "must be a section of keys"]),
        ("name: 20261129", ["name=20261129", "must be text", "quote it"]),
        ("name: 2026-11-29", ["name=2026-11-29", "must be text", "quote it"]),
        ("name: yes", ["name=True", "quote it"]),
        ("runs_dir: 7", ["runs_dir=7", "quote it"]),
        ("seed: 9223372036854775808", ["seed=9223372036854775808", "must be <= 9223372036854775807"]),
        ("seed: 0x" + "f" * 5000, ["seed=a number of thousands of digits must be <="]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_oddities_of_yaml_are_one_line_in_files_and_words(write: Write, text: str, parts: list[str]) -> None:
    for part in parts:
        assert part in refusal(write("run.yaml", text))
    key, _, value = text.partition(": ")
    if "\n" not in text:
        for part in parts:
            assert part in refusal(None, f"{key}={value}")


def test_quoted_values_are_text(write: Write) -> None:
    assert load_config(write("run.yaml", 'name: "20261129"\n')).name == "20261129"
    assert load_config(None, ['name="2026-11-29"']).name == "2026-11-29"
    assert load_config(None, ["seed=9223372036854775807"]).seed == 2**63 - 1


PATH_KEYS = ["runs_dir", "summary_copy", "corpus.cache_dir", "corpus.name", "memory.directory", "checkpoint.resume"]


@pytest.mark.parametrize("key", [*PATH_KEYS, "corpus.paths", "corpus.validation_paths"])
def test_every_path_expands_the_home_directory(key: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    value = "[~/text.txt]" if key.endswith("paths") else "~/text.txt"
    kind = "hub" if key == "corpus.name" else "text"
    words = [f"corpus.kind={kind}", "corpus.paths=[a.txt]", f"corpus.name={'a/b' if kind == 'hub' else 'null'}"]
    found: object = load_config(None, [*words, f"{key}={value}"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == (["/home/someone/text.txt"] if key.endswith("paths") else "/home/someone/text.txt")


def test_includes_expand_the_home_directory(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("base.yaml", "seed: 5\n")
    assert load_config(write("run.yaml", "include: ['~/base.yaml']\n")).seed == 5


def test_paths_need_no_list_and_no_kind() -> None:
    assert load_config(None, ["corpus.paths=a.txt"]).corpus.paths == ["a.txt"]
    assert load_config(None, ["corpus.paths=a.txt"]).corpus.kind == "text"
    assert load_config(None, ["corpus.name=Some/set"]).corpus.kind == "hub"
    with pytest.raises(ConfigError, match=r"corpus\.kind=stdlib does not read corpus\.paths"):
        load_config(None, ["corpus.kind=stdlib", "corpus.paths=a.txt"])


def test_an_include_is_relative_or_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    own = tmp_path / "deep" / "own.yaml"
    own.write_text("include: [configs/model/cheap.yaml]\n")
    assert load_config(own).moe.top_clusters == 1
    own.write_text("include: [configs/model/none.yaml]\n")
    with pytest.raises(ConfigError, match=r"own\.yaml: include: 'configs/model/none\.yaml' is neither relative"):
        load_config(own)
    own.write_text("include: [a\nseed: 1\n")
    with pytest.raises(ConfigError, match=r"own\.yaml: is not valid YAML: line 2: .*: check indentation, colons and q"):
        load_config(own)
