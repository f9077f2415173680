"""Small texts, corpora and token files for the tests of the data layer."""

import json
import random
from collections.abc import Iterable, Iterator
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_dist.config import CorpusConfig, TokenizerConfig
from moe_dist.data.corpora import Corpus
from moe_dist.data.documents import Document
from moe_dist.data.token_file import Encoder, TokenFacts, TokenFile, token_file_writer

SMALL_TOKENIZER = TokenizerConfig(vocab_size=400)


def documents_of(seed: int, count: int) -> Iterator[str]:
    """Texts of 50 to 200 words out of 500."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 7))) for _ in range(500)]
    for _ in range(count):
        yield " ".join(chance.choices(words, k=chance.randint(50, 200))) + ".\n"


def text_corpus(folder: Path, count: int = 60) -> CorpusConfig:
    """A corpus of `count` files of one document each, with its cache, in `folder`."""
    for number, text in enumerate(documents_of(0, count)):
        (folder / f"{number:03}.txt").write_text(text)
    return CorpusConfig(kind="text", paths=[str(folder / "*.txt")], cache_dir=str(folder / "cache"))


def tokens_in_memory(count: int) -> TokenFile:
    """A token file whose ids are 0, 1, 2, ...: an id tells its position."""
    facts = TokenFacts(count, 1, count, count, 0, max(count, 1), 0, "<u4")
    return TokenFile(Path("train.tokens"), facts, 0, np.arange(count, dtype="<u4"))


def write_token_file(path: Path, texts: Iterable[str], tokenizer: Encoder) -> None:
    """A token file of some documents."""
    to_count, to_encode = tee(texts)
    with token_file_writer(path, tokenizer) as writer:
        for text, ids in zip(to_count, tokenizer.encode_all(to_encode), strict=True):
            writer.append(text, ids)


def wikitext_article(number: int) -> str:
    """One article in the format of WikiText's files, from its title to the blank line before the next."""
    prose = "".join(documents_of(number, 3)).replace("\n", " \n").replace(".", " @,@ 5 <unk> .")
    first, second, third = prose.splitlines(keepends=True)
    parts = [f" = Title {number} = \n \n {first}"]
    parts += [f" = = Section {part} = = \n \n {second} = = = Part = = = \n \n {third}" for part in range(3)]
    parts.append(f" = Played {number} , W = Won \n = Played , W = \n {first}")
    blank = " \n" if number % 2 else " \n \n"
    return f"{blank.join(parts)} \n"


def wikitext_like(articles: int) -> str:
    """A text file of that many articles."""
    return "".join(wikitext_article(number) for number in range(articles))


def hf_tokenizer(folder: Path, size: int = 300) -> Path:
    """A byte-level tokenizer of a chat model, in a new folder."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(documents_of(1, 20), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    facts = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


class Sides(NamedTuple):
    """Documents of a split."""

    train: list[Document]
    validation: list[Document]


def sides_of(corpus: Corpus) -> Sides:
    split = corpus.split
    return Sides(list(split.side("train")), list(split.side("validation")))
