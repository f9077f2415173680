"""Refusals before any rank starts: one line each, within two seconds, and nothing is left behind."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConfigError, LaunchError
from moe_dist.launch import preflight
from moe_dist.launch.preflight import checkpoint_bytes, problems, require_free_port, require_ready
from moe_dist.launch.preflight_text import largest_vocabulary


def config(folder: Path, *words: str) -> RunConfig:
    return load_config(None, [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", *words])


def only_problem(folder: Path, *words: str, ranks: int = 1) -> str:
    (line,) = problems(config(folder, *words), ranks)
    return line.replace(str(folder), "HERE")


def test_a_run_that_lacks_nothing_leaves_no_folder(tmp_path: Path) -> None:
    assert problems(config(tmp_path), 1) == []
    assert list(tmp_path.iterdir()) == []


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("gone.txt")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "picture.txt").write_bytes(b"JFI\xff" + b"some words of every kind, with 0123 \n" * 1000)
    (tmp_path / "short.txt").write_text("only a few words and not a sequence.")
    for path, line in {
        "none*.txt": f"corpus.paths: 'HERE/none*.txt' matches no file (relative to {Path.cwd()})",
        ".": "corpus.paths: 'HERE/.' is a folder: name its files, such as HERE/*.txt, or give --text HERE",
        "link.txt": "corpus.paths: HERE/link.txt is a link to 'gone.txt', which does not exist: fetch the data",
        "empty.txt": "corpus.paths: the files hold no text",
        "table.csv": "corpus.paths: HERE/table.csv has none of the supported formats: .txt .tokens .raw .md .rst .py "
        ".jsonl .parquet .txt.gz .txt.zst .jsonl.gz .jsonl.zst",
        "picture.txt": "corpus.paths: HERE/picture.txt is not UTF-8 text: byte 3 is 0xff",
        "short.txt": "corpus.paths: 36 bytes of text are less than a sequence of model.sequence_length=256 for "
        "training and one for validation: give more text or lower it",
    }.items():
        small = ["tokenizer.vocab_size=290"] * (path in ("picture.txt", "short.txt"))
        assert only_problem(tmp_path, f"corpus.paths={tmp_path}/{path}", *small) == line
    blend = f"corpus.sources={{a: {{paths: {tmp_path}/none.txt}}}}"
    assert only_problem(tmp_path, blend).startswith("corpus.sources.a.paths: 'HERE/none.txt' matches no file")


def test_a_vocabulary_beyond_the_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab abc\n" * 100)
    # words: "ab", " ab", " abc"; characters: a, b, c and the space
    assert largest_vocabulary(["ab ab abc\n" * 100]) == 260 + 4 + 2 + 3 + 4
    line = only_problem(tmp_path, f"corpus.paths={tmp_path}/a.txt", "tokenizer.vocab_size=274")
    assert line.startswith("tokenizer.vocab_size=274 is more than 1,000 bytes of text yield: it allows at most 273")
    assert problems(config(tmp_path, f"corpus.paths={tmp_path}/a.txt", "tokenizer.vocab_size=273"), 1) == []


def test_weights_and_tokenizers_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    hf = "tokenizer.kind=hf"
    for words, line in {
        (f"checkpoint.init={tmp_path}/none",): "checkpoint.init=HERE/none does not exist: give the folder of a run",
        (f"checkpoint.resume={tmp_path}/folder",): "checkpoint.resume=HERE/folder holds no checkpoint: give the folder",
        (f"checkpoint.init={tmp_path}/model",): "checkpoint.init=HERE/model is a model of Hugging Face: make a run of "
        "it with `moe-dist import HERE/model -o RUN`, then give checkpoint.init=RUN",
        (hf, f"tokenizer.path={tmp_path}/none"): "tokenizer.path=HERE/none does not exist: give a folder with a",
        (f"tokenizer.path={tmp_path}/folder",): "tokenizer.path=HERE/folder holds no tokenizer.model: give the folder",
        (hf, f"tokenizer.path={tmp_path}/folder"): "tokenizer.path=HERE/folder holds no tokenizer.json: give the",
    }.items():
        assert only_problem(tmp_path, *words).startswith(line)
    (tmp_path / "hf").mkdir()
    for vocabulary in ({"a": 0, "b": 6999}, [["a", 0.0]] * 7000):
        content = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 7001}]}
        (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(content))
        assert only_problem(tmp_path, hf, f"tokenizer.path={tmp_path}/hf", "tokenizer.vocab_size=7000") == (
            "tokenizer.vocab_size=7000 has no room for the 7002 ids of tokenizer.path=HERE/hf: must be >= 7002"
        )
    (tmp_path / "hf" / "tokenizer.json").write_text("[]")
    assert problems(config(tmp_path, hf, f"tokenizer.path={tmp_path}/hf"), 1) == []
    (tmp_path / "run.yaml").touch()
    assert only_problem(tmp_path, f"checkpoint.init={tmp_path}/run.yaml").startswith(
        "checkpoint.init=HERE/run.yaml is a file: give the folder of a run or of a checkpoint"
    )
    (tmp_path / "folder" / "manifest.json").write_text('{"kind": "weights"}')
    assert only_problem(tmp_path, f"checkpoint.resume={tmp_path}/folder") == (
        "checkpoint.resume=HERE/folder holds weights only: start a new run from it with checkpoint.init=HERE/folder"
    )
    (tmp_path / "folder" / "manifest.json").unlink()
    (tmp_path / "folder" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert problems(config(tmp_path, f"checkpoint.resume={tmp_path}/folder"), 1) == []


def test_a_data_set_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
            monkeypatch.delenv(variable, raising=False)
        hub = ["corpus.kind=hub", "corpus.name=Some/text"]
        assert problems(config(tmp_path, *hub), 1) == []
    line = only_problem(tmp_path, *hub)
    assert line.startswith(
        "corpus.name=Some/text is no folder and not in the cache of Hugging Face, and http://127.0.0.1:"
    )
    (tmp_path / "home" / "datasets" / "Some___text").mkdir(parents=True)
    assert problems(config(tmp_path, *hub), 1) == []


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert only_problem(tmp_path, f"runs_dir={tmp_path}/file/runs") == (
        "runs_dir=HERE/file/runs: HERE/file is a file: give a folder"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (0, 0, 0))
    assert only_problem(tmp_path) == (
        "runs_dir=HERE/runs cannot be written: HERE is no place for files; give another folder"
    )
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert problems(config(tmp_path), 1) == [
        f"{key}={tmp_path}/{name} cannot be written: {tmp_path} does not permit it; give another folder"
        for key, name in (("runs_dir", "runs"), ("corpus.cache_dir", "cache"))
    ]
    with pytest.raises(ConfigError, match=r"^runs_dir=.* \(and 1 more: `moe-dist config CONFIG --check` lists all\)$"):
        require_ready(config(tmp_path), None)


def test_too_little_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["moe.kind=dense", "moe.dense_hidden=10", "model.hidden_size=4", "model.heads=2", "model.layers=3"]
    small = config(tmp_path, *words, "tokenizer.vocab_size=300", "checkpoint.every=0")
    assert checkpoint_bytes(small) == 4 * (300 * 4 + 3 * 3 * 4 * small.moe.dense_width)
    monkeypatch.setattr(preflight, "OTHER_FILES", 1 << 60)
    (line,) = problems(small, 1)
    assert line.endswith("GB: free space, or choose another runs_dir")


def test_devices_and_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "has_gpu", lambda: False)
    assert only_problem(tmp_path, "world.backend=nccl") == (
        "world.backend=nccl needs a CUDA GPU, and there is none here: use auto or gloo"
    )
    assert only_problem(tmp_path, "model.attention=flex") == (
        "model.attention=flex trains on GPUs only, and these ranks use the CPU: set it to sdpa"
    )
    monkeypatch.setattr(preflight, "visible_gpu_count", lambda _: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert only_problem(tmp_path, ranks=4).startswith("4 ranks are more than the 2 GPUs of this machine: start fewer")
    assert problems(config(tmp_path, "world.backend=gloo"), 4) == []
    assert problems(config(tmp_path), None) == []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"^--port {port} of localhost: .*: give another one$"):
            require_free_port("localhost", port)
        require_free_port("n1", port)
