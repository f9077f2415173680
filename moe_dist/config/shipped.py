"""Files that come with the program: configurations and templates, of a checkout or of an installed package."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped(name: str | Path) -> Path:
    """Return the path of a shipped file, such as `configs/experiment/demo.yaml`; it may not exist."""
    checkout = PACKAGE.parent / name
    return checkout if checkout.exists() else PACKAGE / "shipped" / name


def or_shipped(path: Path) -> Path:
    """Return a path as it is if it exists, else the shipped file of that relative name if there is one."""
    if path.is_absolute() or path.exists():
        return path
    found = shipped(path)
    return found if found.is_file() else path
