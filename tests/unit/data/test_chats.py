"""Conversations as token files: answers are targets, everything else is context."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_dist.config import CorpusConfig, RunConfig, TokenizerConfig
from moe_dist.data import open_tokenizer, prepare_data
from moe_dist.data.chats import ChatEncoder, ChatSource
from moe_dist.data.packing import PackedSequences
from moe_dist.errors import ConfigError, DataError
from tests.unit.data.samples import hf_tokenizer

pytest.importorskip("transformers", reason="needs moe-dist[models]")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "never answered"},
]
CONTEXT = ["<user>one?</s><assistant>", "<user>three?</s><assistant>"]
ANSWERS = ["two</s>", "four</s>"]


def chat_folder(folder: Path, template: str = TEMPLATE) -> Path:
    """A tokenizer with a chat template."""
    hf_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def chat_file(path: Path, *chats: object) -> Path:
    path.write_text("".join(json.dumps({"messages": chat, "other": 1}) + "\n" for chat in chats))
    return path


def test_only_answers_are_targets(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(chat_folder(tmp_path / "hf") / "tokenizer.json")
    encoder = ChatEncoder(tokenizer)
    (text,) = ChatSource((chat_file(tmp_path / "chats.jsonl", CHAT),)).texts()
    (ids,) = encoder.encode_all([text])
    expected = []
    for context, answer in zip(CONTEXT, ANSWERS, strict=True):
        codes = [[token + (1 << 30) * (token == 1) for token in tokenizer.encode(part)] for part in (context, answer)]
        expected += [~code for code in codes[0]] + codes[1]
    assert ids == expected
    assert sum(abs(code) >= 1 << 30 for code in ids) == 4  # messages that end as documents do
    assert encoder.end_of_document == ~tokenizer.end_of_document


def test_token_files_hold_complements_and_their_share(tmp_path: Path) -> None:
    path = chat_file(
        tmp_path / "chats.jsonl", *([*CHAT[:3], {"role": "assistant", "content": f"{n}"}] for n in range(40))
    )
    corpus = CorpusConfig(kind="chat", paths=[str(path)], cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    tokenizer = TokenizerConfig(kind="hf", path=str(chat_folder(tmp_path / "hf")), vocab_size=320)
    data = prepare_data(corpus, tokenizer)
    assert data.train.ids.dtype == np.dtype("<i4")
    assert data.train.facts.end_of_document == 1
    assert data.train.ids[-1] == ~1
    assert "one?" in open_tokenizer(data.tokenizer_path).decode(data.train.plain_ids.tolist())
    answers = int((data.train.ids >= 0).sum())
    assert 0 < answers < len(data.train)
    assert data.train.target_share == answers / len(data.train)
    assert data.train.plain_ids.max() < 320
    conversations = [ids.tolist() for ids in np.split(data.train.ids, np.flatnonzero(data.train.ids == ~1) + 1)[:-1]]
    assert len(conversations) == data.train.facts.documents == 32
    assert [size for _, sizes in data.train.documents() for size in sizes] == [len(ids) for ids in conversations]
    packed = PackedSequences(data.train, 90)
    rows = packed.read(np.arange(len(packed))).tolist()
    assert packed.facts.cut_documents == 0
    joined = " ".join(map(str, (code for row in rows for code in row)))
    assert all(" ".join(map(str, ids)) in joined for ids in conversations)
    assert packed.target_share == sum(code >= 0 for row in rows for code in row[1:]) / (90 * len(rows))
    cut = PackedSequences(data.train, 30)
    rows = cut.read(np.arange(len(cut))).tolist()
    assert cut.facts.cut_documents == 32
    assert cut.target_share == sum(code >= 0 for row in rows for code in row[1:]) / (30 * len(rows))


@pytest.mark.parametrize(
    ("chat", "match"),
    [
        ("hello", "line 1: messages must be a list of objects with a role and a content"),
        ([{"role": "assistant"}], "line 1: messages must be a list"),
        ([CHAT[0]], "line 1: the conversation has no message of the role assistant"),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, chat: object, match: str) -> None:
    with pytest.raises(DataError, match=match):
        list(ChatSource((chat_file(tmp_path / "chats.jsonl", chat),)).texts())


def test_templates_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    last_only = chat_folder(tmp_path / "last", "{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}")
    raising = chat_folder(tmp_path / "raising", "{{ raise_exception('no system here') }}")
    for folder, match in ((last_only, "changes earlier messages"), (raising, "refuses a conversation: no system here")):
        with pytest.raises(DataError, match=match):
            list(ChatEncoder(open_tokenizer(folder / "tokenizer.json")).encode_all([json.dumps(CHAT)]))
    (raising / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        ChatEncoder(open_tokenizer(raising / "tokenizer.json"))


def test_keys_that_chats_need() -> None:
    with pytest.raises(ConfigError, match=r"corpus.kind=chat needs corpus.paths"):
        CorpusConfig(kind="chat")
    with pytest.raises(ConfigError, match=r"corpus.max_bytes=9 would cut documents"):
        CorpusConfig(kind="chat", paths=["x.jsonl"], max_bytes=9)
    with pytest.raises(ConfigError, match=r"needs the chat template of tokenizer.kind=hf, not bpe"):
        RunConfig(corpus=CorpusConfig(kind="chat", paths=["x.jsonl"]))
