"""Commands on training text: preparation, a look at what was prepared, and checks of it."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_dist.cli.groups import CommandGroup
from moe_dist.cli.options import Config, Overrides
from moe_dist.config import load_config

if TYPE_CHECKING:
    from moe_dist.data import PreparedData, TokenFile
    from moe_dist.data.inspection import TokenReport


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    data = typer.Typer(cls=CommandGroup, help="Prepare training text, look at it, and check it.", no_args_is_help=True)
    data.command()(prepare)
    data.command()(inspect)
    data.command()(validate)
    app.add_typer(data, name="data")


def prepare(
    config: Config,
    overrides: Overrides = None,
    megatron: Annotated[
        Path | None, typer.Option(metavar="PREFIX", help="Also write PREFIX-train.bin, .idx and PREFIX-validation.*.")
    ] = None,
) -> None:
    """Tokenize the text of a configuration into its cache; `train` does the same if it is not done. Can be resumed."""
    from moe_dist.data import prepare_data

    run = load_config(config, overrides or ())
    with _shown_log():
        data = prepare_data(run.corpus, run.tokenizer)
    for name, tokens in _files(data):
        facts = tokens.facts
        typer.echo(f"{tokens.path}: {facts.tokens:,} tokens of {_documents(facts.documents)}, {facts.bytes:,} bytes")
        if megatron is not None:
            from moe_dist.data.megatron_files import write_megatron_files

            prefix = megatron.with_name(f"{megatron.name}-{name.replace(' ', '-')}")
            write_megatron_files(tokens, prefix)
            typer.echo(f"{prefix}.bin and .idx")


def inspect(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show of each side.")] = 2,
    characters: Annotated[int, typer.Option(min=1, help="Characters of a document to show.")] = 300,
) -> None:
    """Show token counts, lengths of documents, and decoded samples of a configuration's text."""
    from rich.console import Console

    from moe_dist.data import open_sequences, open_tokenizer, prepare_data
    from moe_dist.data.inspection import report_of, samples_of

    run = load_config(config, overrides or ())
    with _shown_log():
        data = prepare_data(run.corpus, run.tokenizer)
        sides = [open_sequences(run, data, side) for side in ("train", "validation")]
    length, tokenizer, console = (
        run.model.sequence_length,
        open_tokenizer(data.tokenizer_path),
        Console(highlight=False),
    )
    opened = [sequences for name in data.sources for sequences in (sides[0][name], sides[1][name])]
    for (name, tokens), sequences in zip(_files(data), opened, strict=True):
        console.print(name, style="bold", markup=False)
        console.print(_described(report_of(tokens, sequences, length), length), markup=False, soft_wrap=True)
        for text in samples_of(tokens, tokenizer, samples, characters):
            console.print(f"  | {text!r}", markup=False, soft_wrap=True)


def validate(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Prepared folders, or a cache_dir.")],
    near_duplicates: Annotated[
        bool, typer.Option(help="Also look for near-duplicates of validation text; some milliseconds a document.")
    ] = False,
) -> None:
    """Check prepared text: files, ids, documents, duplicates. Exit code 1 if a folder cannot be trained on."""
    from moe_dist.data.prepared_checks import check_across, check_folder, prepared_folders

    failed, found = False, [folder for path in folders for folder in prepared_folders(path)]
    for folder in found:
        typer.echo(str(folder))
        for finding in check_folder(folder, near_duplicates):
            failed |= finding.level == "fail"
            typer.echo(f"  {finding.level:4} {finding.text}")
    for names, finding in check_across(found):
        typer.echo(f"{names}\n  {finding.level:4} {finding.text}")
    raise typer.Exit(int(failed))


def _files(data: "PreparedData") -> Iterator[tuple[str, "TokenFile"]]:
    """Yield the token files with a name, such as `train`, or `web train` of a blend."""
    for name, source in data.sources.items():
        for tokens in (source.train, source.validation):
            yield f"{name} {tokens.path.stem}".strip(), tokens


def _described(report: "TokenReport", length: int) -> str:
    equal = report.lengths[0] == report.lengths[-1]
    lengths = " ".join(f"{length:,}" for length in report.lengths[: 1 if equal else None])
    quantiles = "" if equal else " (least, quarter, half, three quarters, 95 %, most)"
    return (
        f"  {report.tokens:,} tokens of {_documents(report.documents)}, "
        f"{report.bytes / max(1, report.tokens):.2f} bytes a token\n"
        f"  tokens a document{quantiles}: {lengths}\n"
        f"  {report.sequences:,} sequences of {length}; {report.cut_documents:.1%} of the documents are cut, "
        f"{report.padding:.2%} is padding"
    )


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


@contextmanager
def _shown_log() -> Iterator[None]:
    """Show the progress of the data package on standard error."""
    log, handler = logging.getLogger("moe_dist.data"), logging.StreamHandler(sys.stderr)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
