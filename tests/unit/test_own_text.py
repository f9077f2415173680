"""`--text` of `train` and `launch`."""

import json
from pathlib import Path

import pytest

from moe_dist.cli.training import own_text
from moe_dist.config import load_config
from moe_dist.errors import LaunchError

MY_TEXT = Path(__file__).parents[2] / "configs" / "experiment" / "my-text.yaml"


def test_a_file_or_the_texts_of_a_folder_become_the_corpus(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "deep [er]/c.txt.gz", "d.png", "e.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = ["a.jsonl", "b.txt", "deep [er]/c.txt.gz"]
    assert own_text(tmp_path) == [
        "corpus.kind=text",
        f"corpus.paths={json.dumps([str(tmp_path / name) for name in names])}",
    ]
    corpus = load_config(MY_TEXT, own_text(tmp_path / "b.txt")).corpus
    assert (corpus.kind, corpus.paths) == ("text", [str(tmp_path / "b.txt")])
    assert load_config(MY_TEXT, own_text(tmp_path)).corpus.paths == [str(tmp_path / name) for name in names]
    assert own_text(None) == []


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"--text .*nowhere: no such file or folder"):
        own_text(tmp_path / "nowhere")
    with pytest.raises(LaunchError, match=r"the folder holds no file that ends in \.txt"):
        own_text(tmp_path)
