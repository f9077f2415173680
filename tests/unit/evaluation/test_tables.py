"""The table of an evaluation: losses first, and perplexities that can be read."""

import io

from rich.console import Console

from moe_dist.evaluation.tables import render


def test_losses_come_first_and_huge_perplexities_are_powers_of_ten() -> None:
    out = io.StringIO()
    figures = {"source": "short.txt", "window": 256, "stride": 128, "loss": 4.01, "tokens": 312, "bits_per_byte": 2.1}
    perplexities = {"token_perplexity": 55.147, "word_perplexity": 999_999.4, "plain_word_perplexity": 98_765_432.1}
    run = {"name": "demo", "kind": "clustered", "step": 160, "seed": 0, "ranks": 1, "dtype": "float32"}
    render({**run, "wikitext": {**figures, **perplexities}}, Console(file=out, width=100))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines() if line.strip()]
    assert lines[1:] == [
        "loss and perplexity on short.txt: windows of 256 tokens, stride 128",
        "2.1000 bits a byte",
        "4.0100 nats a token, over 312 tokens",
        "55.147 perplexity of a token of the run's tokenizer",
        "999,999.400 perplexity of a word or line end, as WikiText's literature counts",
        "9.88e+07 perplexity of a word, line ends not counted",
    ]
