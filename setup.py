"""Build step that puts configurations and templates into the wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithFiles(build_py):
    """Build that copies `configs` and `slurm` into the package, where `moe_dist.config.shipped` finds them."""

    def run(self) -> None:
        """Build, and copy unless the install is editable, which uses the checkout's files."""
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "slurm"):
                shutil.copytree(folder, Path(self.build_lib, "moe_dist", "shipped", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFiles})
