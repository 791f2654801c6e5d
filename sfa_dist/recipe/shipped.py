"""The recipes, Slurm scripts and weights that come with the package.

Recipes and scripts are beside it in a clone and inside it where it is installed; weights are always inside it.
"""

from __future__ import annotations

from pathlib import Path

from sfa_dist.errors import RecipeError

RECIPES, SLURM = "recipes", "slurm"
WEIGHTS_PREFIX = "sfa:"
_PACKAGE = Path(__file__).resolve().parents[1]
_WEIGHTS = _PACKAGE / "weights"


def shipped(folder: str) -> Path:
    """The folder of RECIPES or SLURM. setup.cfg puts those of a wheel into the package itself."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def is_repository(root: Path) -> bool:
    """Whether `root` is the clone of this package: jobs run its train.py and find their scripts in its slurm/."""
    return root == _PACKAGE.parent and (root / SLURM / "_common.sh").is_file()


def find_recipe(path: Path) -> Path:
    """A recipe by its path. A path `recipes/...` that does not exist means the shipped recipe of that name."""
    return path if path.exists() else shipped_recipe(path) or path


def shipped_recipe(path: Path) -> Path | None:
    """The shipped recipe that a path `recipes/...` names; None for another path, or if there is none of that name."""
    if path.is_absolute() or path.parts[:1] != (RECIPES,) or ".." in path.parts:
        return None
    found = shipped(RECIPES).joinpath(*path.parts[1:])
    return found if found.is_file() else None


def shipped_recipes() -> list[str]:
    """The names of the shipped recipes, such as `recipes/h_96f.yaml`, without the bases that they share."""
    root = shipped(RECIPES)
    files = (file.relative_to(root) for file in root.rglob("*.yaml"))
    return sorted(str(Path(RECIPES) / file) for file in files if "_base_" not in file.parts)


def shipped_weights() -> list[str]:
    """The names of the weights that come with the package, `sfa:motion-tiny`."""
    return sorted(WEIGHTS_PREFIX + file.stem for file in _WEIGHTS.glob("*.safetensors"))


def weights_path(source: str) -> Path:
    """The file of `sfa:NAME` in the package; for any other source, the path that it is.

    Raises RecipeError for a name that the package does not have.
    """
    if not source.startswith(WEIGHTS_PREFIX):
        return Path(source)
    if source not in shipped_weights():
        raise RecipeError(f"the package has no weights {source}: it has {', '.join(shipped_weights())}")
    return _WEIGHTS / f"{source.removeprefix(WEIGHTS_PREFIX)}.safetensors"
