"""What `moe-dist data inspect` tells of tokens, by hand."""

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from moe_dist import cli
from moe_dist.cli import data
from moe_dist.data.inspection import TokenReport, report_of, samples_of
from moe_dist.data.sequences import ConcatenatedSequences
from moe_dist.data.token_file import TokenFacts, TokenFile
from moe_dist.data.tokenizer import Tokenizer
from tests.unit.data.samples import text_corpus

END = 1


class Letters:
    """A token is a letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + token) for token in ids)


def token_file(*documents: list[int]) -> TokenFile:
    ids = np.array([token for document in documents for token in [*document, END]], dtype="<u2")
    return TokenFile(Path("train.tokens"), TokenFacts(len(ids), len(documents), 40, 9, 3, 30, END, "<u2"), 0, ids)


def test_figures_of_a_token_file() -> None:
    tokens = token_file([2, 3], [4], [5, 6, 7, 8], [])  # lengths 3, 2, 5, 1; in sequences of 4: 0, 0-1, 1-2, 2
    report = report_of(tokens, ConcatenatedSequences(tokens, 4), 4)
    assert (report.tokens, report.documents, report.bytes) == (11, 4, 40)
    assert (report.lengths[0], report.lengths[-1]) == (1, 5)
    assert report.sequences == 2
    assert report.cut_documents == 2 / 4
    assert report.padding == 0


def test_samples_are_whole_beginnings_of_documents() -> None:
    tokens = token_file([2, 3], [4, 5, 6, 7], [8])
    letters: Tokenizer = Letters()  # type: ignore[assignment]
    assert list(samples_of(tokens, letters, 3, 3)) == ["bc", "def", "h"]
    assert list(samples_of(tokens, letters, 1, 9)) == ["bc"]
    assert list(samples_of(tokens, letters, 0, 9)) == []


def test_the_commands(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {sequence_length: 32}\ntokenizer: {vocab_size: 400}\n")
    paths = ",".join(corpus.paths)
    words = [str(tmp_path / "run.yaml"), "corpus.kind=text", f"corpus.paths=[{paths}]", f"corpus.cache_dir={tmp_path}"]
    prepared = CliRunner().invoke(cli.app, ["data", "prepare", *words])
    assert prepared.exit_code == 0, prepared.output
    assert "tokens of 57 documents" in prepared.output  # 5 % of 60 are held out
    assert "tokens of 3 documents" in prepared.output
    shown = CliRunner().invoke(cli.app, ["data", "inspect", *words, "--samples", "1", "--characters", "20"])
    assert shown.exit_code == 0, shown.output
    assert "57 documents" in shown.output
    assert "tokens a document (least, quarter," in shown.output
    assert shown.output.count("  | '") == 2


def test_one_document_has_one_length() -> None:
    report = TokenReport(9, 1, 40, (9,) * 6, 2, 0.5, 0.0)
    first, second, _ = data._described(report, 4).splitlines()
    assert first == "  9 tokens of 1 document, 4.44 bytes a token"
    assert second == "  tokens a document: 9"
