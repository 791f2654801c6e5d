"""The recipes and Slurm scripts that come with the package: beside it in a clone, inside it where it is installed."""

from __future__ import annotations

from pathlib import Path

RECIPES, SLURM = "recipes", "slurm"
_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(folder: str) -> Path:
    """The folder of RECIPES or SLURM. setup.cfg puts those of a wheel into the package itself."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def is_repository(root: Path) -> bool:
    """Whether `root` is the clone of this package: jobs run its train.py and find their scripts in its slurm/."""
    return root == _PACKAGE.parent and (root / SLURM / "_common.sh").is_file()


def find_recipe(path: Path) -> Path:
    """A recipe by its path. A path `recipes/...` that does not exist means the shipped recipe of that name."""
    if path.is_absolute() or path.exists() or path.parts[:1] != (RECIPES,) or ".." in path.parts:
        return path
    found = shipped(RECIPES).joinpath(*path.parts[1:])
    return found if found.is_file() else path


def shipped_recipes() -> list[str]:
    """The names of the shipped recipes, such as `recipes/h_96f.yaml`, without the bases that they share."""
    root = shipped(RECIPES)
    files = (file.relative_to(root) for file in root.rglob("*.yaml"))
    return sorted(str(Path(RECIPES) / file) for file in files if "_base_" not in file.parts)
