"""The shape of the code: imports point downward, and each foreign framework lives in one room.

Read from the source by `ast`, so that an import inside a function counts as well.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from moe_dist.launch.tasks import TASKS, resolve

ROOT = Path(__file__).resolve().parents[2]
LEVELS = [
    {"errors", "console"},
    {"config"},
    {"metrics", "launch"},
    {"distributed"},
    {"clustering", "compression"},
    {"kernels", "dispatch", "memory"},
    {"moe"},
    {"model"},
    {"engine", "data"},
    {"conversion"},
    {"checkpoint"},
    {"recluster", "evaluation"},
    {"distillation"},
    {"training", "integrations"},
    {"simulator", "doctor", "report"},
    {"benchmarks"},
    {"studies"},
    {"cli"},
    {"__main__"},
]
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
LAUNCH_MAY_IMPORT = {"moe_dist.config", "moe_dist.errors", "moe_dist.launch"}
REGISTRY = "moe_dist/launch/tasks.py"  # the one place that names modules above its own
FRAMEWORKS = [
    (
        "megatron",
        (
            "moe_dist/model/megatron_",
            "moe_dist/data/megatron_",
            "moe_dist/integrations/megatron.py",
            "moe_dist/benchmarks/baselines/",
        ),
    ),
    ("deepspeed", ("moe_dist/engine/", "moe_dist/integrations/deepspeed.py", "moe_dist/benchmarks/baselines/")),
]


@dataclass(frozen=True)
class Import:
    """One import statement's target, as a dotted name."""

    file: str
    line: int
    target: str
    at_run_time: bool  # false under `if TYPE_CHECKING:`
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    files = (ROOT / "moe_dist").rglob("*.py")
    return {module_name(path): path for path in files}


def statements(node: ast.AST, run_time: bool = True, top: bool = True) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, run_time, top
        guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from statements(child, run_time and not guarded, top and not inside)


def targets(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
    if isinstance(statement, ast.ImportFrom):
        assert statement.level == 0, f"relative import on line {statement.lineno}"
        for alias in statement.names:  # `from package import module` names a module, `from module import name` does not
            longer = f"{statement.module}.{alias.name}"
            yield longer if longer in modules() else str(statement.module)


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for path in modules().values():
        for statement, run_time, top in statements(ast.parse(path.read_text(encoding="utf-8"))):
            file = path.relative_to(ROOT).as_posix()
            found += [Import(file, statement.lineno, target, run_time, top) for target in targets(statement)]
    return tuple(found)


def package(name: str) -> str | None:
    """The package of the project that a dotted name or a file lies in, None for another's."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == "moe_dist" and len(parts) > 1 and parts[1] != "__init__" else None


def complain(broken: list[Import]) -> None:
    assert not broken, "\n" + "\n".join(map(str, broken))


def test_every_package_has_a_level() -> None:
    packages = {package(name) for name in modules()} - {None}
    assert packages <= LEVEL.keys(), f"without a level: {packages - LEVEL.keys()}"


def test_imports_point_downward() -> None:
    def upward(found: Import) -> bool:
        own, other = package(found.file), package(found.target)
        return own is not None and other is not None and own != other and LEVEL[other] >= LEVEL[own]

    complain([found for found in imports() if upward(found)])


def test_launch_uses_configuration_and_errors_alone() -> None:
    def foreign(found: Import) -> bool:
        if package(found.file) != "launch" or package(found.target) is None:
            return False
        return not any(found.target == name or found.target.startswith(f"{name}.") for name in LAUNCH_MAY_IMPORT)

    complain([found for found in imports() if foreign(found)])


def test_only_the_registry_of_tasks_names_functions_by_strings() -> None:
    users = [path for path in modules().values() if re.search(r'"moe_dist[\w.]+:\w+"', path.read_text())]
    assert [path.relative_to(ROOT).as_posix() for path in users] == [REGISTRY]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_resolves(name: str) -> None:
    task = TASKS[name]
    assert callable(resolve(task.function))
    assert task.options is None or is_dataclass(resolve(task.options))


@pytest.mark.parametrize(("framework", "rooms"), FRAMEWORKS)
def test_each_framework_lives_in_its_rooms(framework: str, rooms: tuple[str, ...]) -> None:
    users = [found for found in imports() if found.target.split(".")[0] == framework]
    complain([found for found in users if not found.file.startswith(rooms)])
    assert users, f"nothing imports {framework}: is this test still reading the right files?"


def test_the_largest_package_is_a_tenth_of_the_code() -> None:
    lines: dict[str, int] = {}
    for name, path in modules().items():
        lines[package(name) or ""] = lines.get(package(name) or "", 0) + path.read_text().count("\n")
    largest = max(lines, key=lambda name: lines[name])
    assert lines[largest] <= 0.1 * sum(lines.values()), (largest, lines[largest], sum(lines.values()))


@pytest.mark.parametrize("script", sorted((ROOT / "launcher").glob("*.py")), ids=lambda path: path.name)
def test_entry_scripts_are_thin(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 20
    subprocess.run([sys.executable, str(script), "--help"], cwd=ROOT, capture_output=True, check=True)


def test_no_module_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    names = {path.relative_to(ROOT).as_posix(): name for name, path in modules().items()}
    for found in imports():
        if found.at_run_time and found.target in graph and found.target != names[found.file]:
            graph[names[found.file]].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "module",
    ["moe_dist.cli", "moe_dist.config", "moe_dist.metrics", "moe_dist.launch.rank", "moe_dist.launch.runners"]
    + [task.options.partition(":")[0] for task in TASKS.values() if task.options],
)
def test_answers_without_torch(module: str) -> None:
    """Transitively: help and refusals must not wait for seconds of imports."""
    heavy = ("torch", "deepspeed", "megatron", "datasets", "scipy", "tensorboard")
    code = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "no-such.yaml"],
        ["config", "seed.yaml", "moe.rnk=2"],
        ["reproduce", "--kind", "nope"],
        ["reproduce", "--configs", str(ROOT / "configs"), "moe.rnk=2"],
        ["eval", "nope"],
        ["export", "nope", "-o", "weights.safetensors"],
        ["export", "nope", "--format", "hf", "-o", "folder"],
        ["import", "nope", "-o", "run"],
        ["generate", "nope", "--prompt", "x"],
        ["store-logits", "no-such.yaml", "-o", "folder"],
        ["bench", "quality", "--recipe", "nope"],
    ],
    ids=" ".join,
)
def test_help_and_refusals_import_no_torch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "seed.yaml").write_text("seed: 1\n")
    code = "import sys; from moe_dist import cli\ntry: cli.main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.returncode == (0 if "--help" in words else 2)
