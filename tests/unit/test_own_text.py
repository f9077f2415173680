"""`--text` of `train`, `launch` and `config`."""

import json
from pathlib import Path

import pytest

from moe_dist.cli.own_text import corpus_words, files_of, fitting_words, with_text
from moe_dist.config import dump_config, load_config
from moe_dist.data import prepare_data
from moe_dist.errors import LaunchError
from moe_dist.launch.preflight import problems

MY_TEXT = Path(__file__).parents[2] / "configs" / "experiment" / "my-text.yaml"


def test_a_file_or_the_texts_of_a_folder_become_the_corpus(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "deep [er]/c.txt.gz", "d.png", "e.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = ["a.jsonl", "b.txt", "deep [er]/c.txt.gz"]
    given = f"corpus.paths={json.dumps([str(tmp_path / name) for name in names])}"
    assert with_text(tmp_path, "my.yaml", ["seed=1"]) == ("my.yaml", ["corpus.kind=text", given, "seed=1"])
    corpus = load_config(MY_TEXT, corpus_words(files_of(tmp_path))).corpus
    assert (corpus.kind, corpus.paths) == ("text", [str(tmp_path / name) for name in names])
    assert with_text(None, "my.yaml", None) == ("my.yaml", [])
    assert with_text(None, "seed=1", ["my.yaml", "seed=2"]) == ("my.yaml", ["seed=1", "seed=2"])


def test_conversations_are_recognized(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    assert corpus_words(files_of(tmp_path))[0] == "corpus.kind=chat"
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    assert corpus_words(files_of(tmp_path))[0] == "corpus.kind=text"


@pytest.mark.parametrize(
    ("kilobytes", "vocabulary", "steps"), [(10, 320, 100), (2000, 8192, 325), (90_000, 8192, 5000)]
)
def test_without_a_configuration_sizes_fit_the_text(
    tmp_path: Path, kilobytes: int, vocabulary: int, steps: int
) -> None:
    """2,000 kB: 20,000 pieces would be a piece a hundred bytes; four passes of 3 bytes a token, 8,192 tokens a step."""
    text = tmp_path / "mine.txt"
    text.write_bytes(b"".join(b"word%d stands here\n" % number for number in range(5000))[: 1000 * min(kilobytes, 90)])
    with text.open("ab") as file:
        file.truncate(1000 * kilobytes)
    path, words = with_text(text, None, [f"runs_dir={tmp_path}", f"corpus.cache_dir={tmp_path}"])
    config = load_config(path, words)
    assert config.name == "my-text"
    assert abs(config.tokenizer.vocab_size - vocabulary) <= 2 * 35
    assert config.train.steps == steps
    assert problems(config, 1) == []


def test_a_text_of_one_document_has_held_out_parts(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"On day {day} it rained {day * day} drops.\n" for day in range(220)))  # 7 kB
    config = load_config(*with_text(text, None, [f"corpus.cache_dir={tmp_path}"]))
    data, length = prepare_data(config.corpus, config.tokenizer), config.model.sequence_length
    assert len(data.validation) > length
    assert len(data.train) > 3 * len(data.validation)


def test_settings_win_over_what_fits(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("some words\n" * 9999)
    short = load_config(*with_text(tmp_path, "train.steps=7", [])).train
    assert (short.steps, short.warmup_steps) == (7, 1), "a warm-up is no longer than the run"
    assert load_config(*with_text(tmp_path, "train.steps=7", ["train.warmup_steps=3"])).train.warmup_steps == 3
    assert any(word.startswith("tokenizer.vocab_size=") for word in fitting_words(files_of(tmp_path)))


def test_the_model_of_a_run_is_trained_on_other_text(tmp_path: Path) -> None:
    run, text = tmp_path / "mine", tmp_path / "other.txt"
    run.mkdir()
    theirs = ["name=mine", "model.sequence_length=128", "moe.experts=8", "moe.clusters=2", "moe.warmup_standard=0.5"]
    then = load_config(MY_TEXT, [*theirs, "tokenizer.vocab_size=300", "optimizer.learning_rate=0.02"])
    (run / "config.yaml").write_text(dump_config(then))
    (run / "tokenizer.model").touch()
    text.write_text("some words\n" * 9999)
    path, words = with_text(text, f"checkpoint.init={run}", ["train.eval_every=7"])
    config = load_config(path, words)
    assert config.model == then.model
    assert config.moe == then.moe.model_copy(update={"warmup_standard": 0.0})
    assert config.tokenizer == then.tokenizer.model_copy(update={"path": str(run)})
    assert (config.name, config.optimizer.learning_rate, config.train.eval_every) == ("mine-tuned", 0.005, 7)


@pytest.mark.parametrize(("ranks", "batch"), [(1, 8), (3, 9), (4, 8), (16, 16)])
def test_the_batch_divides_over_the_ranks(tmp_path: Path, ranks: int, batch: int) -> None:
    (tmp_path / "a.txt").write_text("A few words are here, and a few more. " * 100)
    path, words = with_text(tmp_path / "a.txt", None, None, ranks)
    assert load_config(path, words).train.global_batch_size == batch


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"--text .*nowhere: no such file or folder"):
        with_text(tmp_path / "nowhere", None, None)
    with pytest.raises(LaunchError, match=r"the folder holds no file that ends in \.txt"):
        with_text(tmp_path, None, None)
    with pytest.raises(LaunchError, match="CONFIG is missing: give a YAML file"):
        with_text(None, None, None)
