"""Arguments and options that several commands share, and options made from the fields of a specification."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from moe_dist.launch.files import writable
from moe_dist.launch.job import Launcher
from moe_dist.launch.options import KEY, WITHOUT, OptionHelp

Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=lambda file: file and writable(Path(file)),
        help="Also write the figures to this file, as JSON.",
    ),
]
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/experiment/demo.yaml.")]
ConfigOrText = Annotated[
    str | None,
    typer.Argument(metavar="[CONFIG]", help="YAML file, such as configs/experiment/demo.yaml; not needed with --text."),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that win over CONFIG.")]
OwnText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE|FOLDER",
        help="Train on this text instead of CONFIG's corpus; without CONFIG, sizes are chosen to fit it.",
    ),
]
TrainedRun = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/demo, or a checkpoint.")]
StartedBy = Annotated[Launcher, typer.Option(help="Program that starts the ranks.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Rendezvous port of several machines, on the first.")]

# Recipes that are trained and compared.
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each recipe, seeds 0 and on.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, of one thread each.")]
RecipeFolder = Annotated[Path, typer.Option(help="Folder of the quality-*.yaml files.")]
FinishedRuns = Annotated[Path, typer.Option(help="Folder of the finished runs.")]

Command = Callable[..., None]


def takes(**specifications: type | tuple[type, ...]) -> Callable[[Command], Command]:
    """Add the options that specifications declare to a command.

    Args:
        specifications: name of a parameter of the command -> dataclass that it receives, built from the options; a
            tuple of dataclasses: it receives a dict of the options that were given, by field name.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command).parameters
        declared: dict[str, dict[str, inspect.Parameter]] = {name: {} for name in own if name in specifications}
        for name, options in declared.items():
            given = specifications[name]
            for specification in given if isinstance(given, tuple) else (given,):
                options |= {key: _parameter(key, *found) for key, found in _declared(specification).items()}

        @functools.wraps(command)
        def run(**values: Any) -> None:
            for name, options in declared.items():
                given = {key: values.pop(key) for key in options}
                given = {
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in given.items()
                    if value not in (None, [])
                }
                kind = specifications[name]
                values[name] = given if isinstance(kind, tuple) else build(kind, given)
            command(**values)

        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name in own
            for parameter in (declared[name].values() if name in declared else [own[name]])
        ]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def build(specification: type, values: dict[str, Any]) -> Any:
    """Return a specification with those of `values` that it declares, also in a field that is a specification."""
    hints, names = get_type_hints(specification), [field.name for field in fields(specification)]
    arguments = {field.name: values[field.name] for field in fields(specification) if field.name in values}
    inner = {name: value for name, value in values.items() if name not in names}
    nested = {name: build(hints[name], inner) for name in names if is_dataclass(hints[name])}
    return specification(**nested, **arguments)


def _declared(specification: type) -> dict[str, tuple[Any, OptionHelp, Any]]:
    """Return type, help and default of every option of a specification, nested ones included, by field name."""
    hints = get_type_hints(specification)
    found: dict[str, tuple[Any, OptionHelp, Any]] = {}
    for field in fields(specification):
        if is_dataclass(hints[field.name]):
            inner, without = _declared(hints[field.name]), field.metadata.get(WITHOUT, ())
            found |= {name: entry for name, entry in inner.items() if name not in without}
        elif KEY in field.metadata:
            found[field.name] = (hints[field.name], field.metadata[KEY], field.default)
    return found


def _parameter(name: str, kind: Any, declared: OptionHelp, default: Any) -> inspect.Parameter:
    """Return the parameter of a command whose value is None unless the option was given."""
    if isinstance(kind, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    text = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    shown = f" Default: {text}." if default not in (None, (), False) and "efault" not in declared.help else ""
    option = typer.Option(
        *([declared.flag] if declared.flag else []),
        help=declared.help + shown,
        min=declared.minimum,
        max=declared.maximum,
        metavar=declared.metavar,
    )
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
