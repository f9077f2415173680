"""A user's own text as the corpus: `--text FILE_OR_FOLDER`, with vocabulary and sizes that fit it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.config.initial_run import initial_settings
from moe_dist.config.shipped import shipped
from moe_dist.config.text_formats import COMPRESSIONS, ENDINGS, PLAIN
from moe_dist.errors import LaunchError
from moe_dist.launch.preflight_text import largest_vocabulary

OWN_TEXT = "configs/experiment/my-text.yaml"
SAMPLE_BYTES = 4_000_000
COMPRESSION = 3
"""Ratio of plain to compressed text, roughly."""
BYTES_PER_TOKEN, PASSES = 3, 4
SMALL = 100_000
"""Bytes below which sequences and batches are short, and a larger part is held out."""
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 320, 8192
FEWEST_STEPS, MOST_STEPS, MOST_WARMUP = 100, 5000, 20


def with_text(
    path: Path | None, config: str | None, overrides: Sequence[str] | None, ranks: int = 1
) -> tuple[str, list[str]]:
    """Return the configuration and the overrides of a command that takes `--text`.

    Without a configuration it is the shipped one for own text. Vocabulary and sizes are chosen by the text, or are
    those of the run whose weights it starts from; the batch divides over the ranks.

    Raises:
        LaunchError: there is neither a configuration nor a text, or no such text.
    """
    words = [word for word in (config, *(overrides or ())) if word is not None]
    config = next((word for word in words if "=" not in word or Path(word).exists()), None)
    if config is not None:
        words.remove(config)
    if config is None and path is None:
        raise LaunchError("CONFIG is missing: give a YAML file, such as configs/experiment/demo.yaml, or --text FILE")
    if path is None:
        return str(config), words
    files = files_of(path)
    own = corpus_words(files)
    if config:
        return config, [*own, *words]
    init = next((word.partition("=")[2] for word in reversed(words) if word.startswith("checkpoint.init=")), None)
    fitting = fitting_words(files, ranks) if init is None else fine_tuning_words(files, initial_settings(init), ranks)
    return str(shipped(OWN_TEXT)), [*own, *fitting, *_warmup_words([*fitting, *words]), *words]


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
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(ENDINGS))
    if not files:
        raise LaunchError(f"--text {path}: the folder holds no file that ends in {' '.join(ENDINGS)}")
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


def fitting_words(files: Sequence[Path], ranks: int = 1) -> list[str]:
    """Return the overrides of vocabulary, length and steps that fit a text."""
    size = _size(files)
    length = 256 if size >= SMALL else 64
    return [
        f"tokenizer.vocab_size={_vocabulary(files, size)}",
        f"model.sequence_length={length}",
        *_step_words(size, length, ranks),
    ]


def fine_tuning_words(files: Sequence[Path], run: Mapping[str, Any], ranks: int = 1) -> list[str]:
    """Return the overrides that make a run's model the one that is trained, for steps that fit a text.

    Args:
        run: configuration of the run; empty: it is not known, and the model is that of the shipped configuration.
    """
    kept = {name: run[name] for name in ("model", "moe", "precision") if isinstance(run.get(name), Mapping)}
    length = kept.get("model", {}).get("sequence_length")
    words = [f"{name}={json.dumps(section)}" for name, section in kept.items()]
    if "moe" in kept:
        words.append("moe.warmup_standard=0.0")  # the weights are those after a warm-up
    if isinstance(rate := run.get("optimizer", {}).get("learning_rate"), float):
        words.append(f"optimizer.learning_rate={rate / 4}")
    return [f"name={run.get('name', 'my-text')}-tuned", *words, *_step_words(_size(files), length or 256, ranks)]


def _size(files: Sequence[Path]) -> int:
    """Return the bytes of plain text, roughly."""
    return sum(file.stat().st_size * (COMPRESSION if file.suffix in COMPRESSIONS else 1) for file in files)


def _step_words(size: int, length: int, ranks: int) -> list[str]:
    batch = math.ceil((32 if size >= SMALL else 8) / ranks) * ranks
    steps = min(MOST_STEPS, max(FEWEST_STEPS, PASSES * size // BYTES_PER_TOKEN // (length * batch)))
    return [
        f"train.global_batch_size={batch}",
        f"train.steps={steps}",
        f"train.eval_every={max(1, steps // 4)}",
        f"checkpoint.every={max(1, steps // 4)}",
        *(["corpus.validation_fraction=0.2"] if size < SMALL else []),
    ]


def _warmup_words(words: Sequence[str]) -> list[str]:
    """Return the override of a warm-up that is shorter than the run, however many steps the user has asked for."""
    steps = next(word.partition("=")[2] for word in reversed(words) if word.startswith("train.steps="))
    return [f"train.warmup_steps={min(MOST_WARMUP, int(steps) // 5)}"] if steps.isdecimal() else []


def _vocabulary(files: Sequence[Path], size: int) -> int:
    """Return a vocabulary of about a piece for each hundred bytes, with room for every character."""
    sample, left = [], SAMPLE_BYTES
    for file in files:
        if file.suffix in PLAIN and left > 0:
            with file.open("rb") as text:
                sample.append(text.read(left).decode(errors="replace"))
            left -= len(sample[-1])
    wanted = max(SMALLEST_VOCABULARY, min(LARGEST_VOCABULARY, 1 << (size // 100).bit_length()))
    if not sample:
        return wanted
    characters = len(set().union(*sample))
    return min(max(wanted, SMALLEST_VOCABULARY + 2 * characters), largest_vocabulary(sample))
