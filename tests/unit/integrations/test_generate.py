"""Texts generated from runs and exports, and the tokenizers that come along."""

import importlib
import json
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from moe_dist import cli
from moe_dist.config import TokenizerConfig
from moe_dist.data.hf_tokenizer import HuggingFaceTokenizer
from moe_dist.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from moe_dist.errors import CheckpointError
from moe_dist.integrations.huggingface.generate import GenerationOptions, exported, generate
from moe_dist.integrations.huggingface.sentencepiece_tokenizer import converted_files
from tests.distributed.ranks import run_ranks
from tests.unit.data.samples import documents_of

pytest.importorskip("transformers", reason="needs moe-dist[models]")

from tests.unit.integrations.random_runs import LATENT, random_runs

PROMPTS = ["one two", "a much longer prompt than the first"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_converted_tokenizer_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    texts = [*documents_of(1, 40), "two  spaces,\n\n\ttabs, naïve 日本\r\n ", ""]
    trained = train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=500))
    (tmp_path / "tokenizer.model").write_bytes(trained)
    before = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    for name, content in converted_files(before.path).items():
        (tmp_path / name).write_bytes(content)
    after = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert (after.vocab_size, after.end_of_document) == (before.vocab_size, before.end_of_document)
    for text in [*texts, *documents_of(2, 10)]:
        assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clustered run with random weights, beside one with latent attention."""
    path = tmp_path_factory.mktemp("runs") / "run"
    run_ranks(random_runs, 1, {path: ["moe.top_k=1"], path.with_name("latent"): [*LATENT, "moe.dense_layers=1"]})
    return path


@pytest.mark.parametrize("name", ["run", "latent"])
def test_a_batch_gives_what_each_prompt_gives_alone(run: Path, name: str) -> None:
    options = GenerationOptions(max_tokens=6)
    alone = [generate(run.with_name(name), [prompt], options)[0] for prompt in PROMPTS]
    assert generate(run.with_name(name), PROMPTS, options) == alone
    assert all(alone)


def test_draws_are_those_of_the_seed(run: Path) -> None:
    drawn = [
        generate(run, PROMPTS[:1], GenerationOptions(max_tokens=12, temperature=2.0, top_p=0.99, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = generate(run, PROMPTS[:1], GenerationOptions(max_tokens=12))
    assert generate(run, PROMPTS[:1], GenerationOptions(max_tokens=12, temperature=1.0, top_p=0.001)) == greedy


def test_the_command_streams_or_prints_whole(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def output(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([*words])
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        return captured.out

    exported = str(tmp_path / "hf")
    assert "MoeDistForCausalLM" in output("export", str(run), "--format", "hf", "-o", exported)
    streamed = output("generate", exported, "--prompt", PROMPTS[0], "--max-tokens", "6")
    assert streamed == output("generate", str(run), "--prompt", PROMPTS[0], "--max-tokens", "6", "--whole")
    pipeline = importlib.import_module("transformers").pipeline("text-generation", exported, device="cpu")
    [made] = pipeline(PROMPTS[0], max_new_tokens=6, do_sample=False, return_full_text=False, add_special_tokens=False)
    assert made["generated_text"].strip() in streamed
    output("generate", str(run), "--chat", "--prompt", "x", "--max-tokens", "2")
    assert "MoeDistForCausalLM" in output("import", exported, "-o", str(tmp_path / "again"))
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        generate(tmp_path / "hf", ["x"], GenerationOptions(chat=True))


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("the server does not listen")


def test_a_run_is_served_as_it_generates(run: Path) -> None:
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="needs moe-dist[serve]")
    from moe_dist.integrations.huggingface.serve import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with exported(run) as folder:
        server = serve(folder, "127.0.0.1", port, non_blocking=True)
        try:
            body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            _wait_for(port)
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = json.loads(answer.read())["choices"][0]["text"]
        finally:
            server.kill_server()
    assert text == generate(run, PROMPTS[:1], GenerationOptions(max_tokens=6))[0]
