"""Start of counting in each Python process of a measured program: once it initializes torch.distributed.

Python imports the first module of this name on its path at every start. It is found through PYTHONPATH, so another one
of the environment is hidden by it, and is run from here.
"""

import functools
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = str(Path(__file__).parent)
WATCHED = "torch.distributed.distributed_c10d"


class _CountingLoader(Loader):
    """Loader of torch's module of collectives, whose first process group starts the counting."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the original loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and let the creation of the default process group start the counting."""
        self._loader.exec_module(module)
        before = module.init_process_group

        @functools.wraps(before)
        def init_process_group(*arguments: Any, **options: Any) -> Any:
            _start()
            return before(*arguments, **options)

        module.init_process_group = init_process_group  # type: ignore[attr-defined]


def _start() -> None:
    import moe_dist_attach  # type: ignore[import-not-found]  # beside this file, on the path of this process

    moe_dist_attach.install()


class _Watcher(MetaPathFinder):
    """Finder of torch's module of collectives."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the module's specification with a loader that counts; None for all other modules."""
        if name != WATCHED:
            return None
        spec = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            spec.loader = _CountingLoader(spec.loader)
        return spec


def _run_hidden() -> None:
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(HERE).resolve()]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _Watcher())
_run_hidden()
