"""Tokenizer of a run whose weights a new run starts from."""

from pathlib import Path

import pytest

from moe_dist.config import dump_config, load_config
from moe_dist.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "manifest.json").write_text("{}")
    (folder / "tokenizer.model").touch()
    (folder / "config.yaml").write_text(dump_config(load_config(None, ["tokenizer.vocab_size=300"])))
    return folder


def test_it_is_taken_unless_the_user_chooses_one(run: Path) -> None:
    init = f"checkpoint.init={run}"
    for at in (run, run / "final"):
        tokenizer = load_config(None, [f"checkpoint.init={at}"]).tokenizer
        assert (tokenizer.kind, tokenizer.path, tokenizer.vocab_size) == ("bpe", str(run), 300)
    assert load_config(None, [init, "tokenizer.vocab_size=400"]).tokenizer.path is None
    other = load_config(None, [init], {"tokenizer": {"path": "other", "vocab_size": 500}}).tokenizer
    assert (other.path, other.vocab_size) == ("other", 500)
    below = {"tokenizer": {"vocab_size": 500}}  # of a file, where it is the vocabulary of a new tokenizer
    assert load_config(None, [init], below).tokenizer.vocab_size == 300
    assert load_config(None, [f"checkpoint.init={run.parent}"], below).tokenizer.vocab_size == 500
    (run / "tokenizer.model").unlink()
    assert load_config(None, [init], below).tokenizer.vocab_size == 500


@pytest.mark.parametrize("content", ["- a", "tokenizer: 1", "a: [", "\xff"])
def test_a_damaged_configuration_is_named(run: Path, content: str) -> None:
    (run / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"checkpoint.init=.*mine: .*config.yaml (cannot be read|is not the)"):
        load_config(None, [f"checkpoint.init={run}"])
