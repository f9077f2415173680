"""A user's own text as the corpus: `--text FILE_OR_FOLDER`, with vocabulary and sizes that fit it."""

import json
from collections.abc import Sequence
from pathlib import Path

from moe_dist.config.shipped import shipped
from moe_dist.errors import LaunchError
from moe_dist.launch.preflight_text import WHOLE_TEXT, largest_vocabulary

TEXT_ENDINGS = (".txt", ".jsonl", ".parquet", ".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst")
OWN_TEXT = "configs/experiment/my-text.yaml"
SAMPLE_BYTES = 4_000_000
COMPRESSION = 3
"""Ratio of plain to compressed text, roughly."""
BYTES_PER_TOKEN, PASSES = 3, 4
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 320, 8192
FEWEST_STEPS, MOST_STEPS = 100, 5000


def with_text(path: Path | None, config: str | None, overrides: Sequence[str] | None) -> tuple[str, list[str]]:
    """Return the configuration and the overrides of a command that takes `--text`.

    Without a configuration it is the shipped one for own text, with vocabulary and sizes chosen by the text.

    Raises:
        LaunchError: there is neither a configuration nor a text, or no such text.
    """
    words = list(overrides or ())
    if config is not None and "=" in config and not Path(config).exists():
        words, config = [config, *words], None
    if config is None and path is None:
        raise LaunchError("CONFIG is missing: give a YAML file, such as configs/experiment/demo.yaml, or --text FILE")
    if path is None:
        return str(config), words
    files = files_of(path)
    own = corpus_words(files)
    return (config, [*own, *words]) if config else (str(shipped(OWN_TEXT)), [*own, *fitting_words(files), *words])


def files_of(path: Path) -> list[Path]:
    """Return the file, or all text files of the folder.

    Raises:
        LaunchError: there is no such path, or the folder holds no text.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise LaunchError(f"--text {path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(TEXT_ENDINGS))
    if not files:
        raise LaunchError(f"--text {path}: the folder holds no file that ends in {' '.join(TEXT_ENDINGS)}")
    return files


def corpus_words(files: Sequence[Path]) -> list[str]:
    """Return the overrides that make files the corpus: conversations if all hold messages, else text."""
    kind = "chat" if all(_holds_messages(file) for file in files) else "text"
    return [f"corpus.kind={kind}", f"corpus.paths={json.dumps([str(file) for file in files])}"]


def _holds_messages(file: Path) -> bool:
    """Return True if a table's first line is a conversation."""
    if file.suffix != ".jsonl":
        return False
    try:
        with file.open(encoding="utf-8") as lines:
            return "messages" in json.loads(lines.readline())
    except (OSError, ValueError, TypeError):
        return False  # reported when the text is read


def fitting_words(files: Sequence[Path]) -> list[str]:
    """Return the overrides of vocabulary, length and steps that fit a text."""
    size = sum(file.stat().st_size * (COMPRESSION if file.suffix in (".gz", ".zst") else 1) for file in files)
    length = 256 if size >= 100_000 else 64
    batch = 32 if size >= 100_000 else 8
    tokens_per_step = length * batch
    steps = min(MOST_STEPS, max(FEWEST_STEPS, PASSES * size // BYTES_PER_TOKEN // tokens_per_step))
    return [
        f"tokenizer.vocab_size={_vocabulary(files, size)}",
        f"model.sequence_length={length}",
        f"train.global_batch_size={batch}",
        f"train.steps={steps}",
        f"train.eval_every={max(1, steps // 4)}",
        f"checkpoint.every={max(1, steps // 4)}",
        *(["corpus.validation_fraction=0.2"] if size < 100_000 else []),
    ]


def _vocabulary(files: Sequence[Path], size: int) -> int:
    """Return a vocabulary of about a piece for each hundred bytes, with room for every character."""
    sample, left = [], SAMPLE_BYTES
    for file in files:
        if file.suffix in WHOLE_TEXT and left > 0:
            with file.open("rb") as text:
                sample.append(text.read(left).decode(errors="replace"))
            left -= len(sample[-1])
    wanted = max(SMALLEST_VOCABULARY, min(LARGEST_VOCABULARY, 1 << (size // 100).bit_length()))
    if not sample:
        return wanted
    characters = len(set().union(*sample))
    return min(max(wanted, SMALLEST_VOCABULARY + 2 * characters), largest_vocabulary(sample))
