"""What comes with the package: recipes and Slurm scripts, in a clone beside it and in an installed package inside it;
and weights, always inside it."""

from __future__ import annotations

from pathlib import Path

from sfa_dist.errors import RecipeError

RECIPES, SLURM = "recipes", "slurm"
WEIGHTS_PREFIX = "sfa:"
_PACKAGE = Path(__file__).resolve().parents[1]
_WEIGHTS = _PACKAGE / "weights"


def shipped(folder: str) -> Path:
    """Where RECIPES or SLURM are: of a wheel in the package itself, as setup.cfg puts them there."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def is_repository(root: Path) -> bool:
    """Whether `root` is the package's clone: jobs run its train.py, and find its scripts in its slurm/."""
    return root == _PACKAGE.parent and (root / SLURM / "_common.sh").is_file()


def find_recipe(path: Path) -> Path:
    """A recipe by its path. One that is not there, but is called `recipes/...`, is the shipped one of this name."""
    if path.is_absolute() or path.exists() or path.parts[:1] != (RECIPES,) or ".." in path.parts:
        return path
    found = shipped(RECIPES).joinpath(*path.parts[1:])
    return found if found.is_file() else path


def shipped_recipes() -> list[str]:
    """The names by which the shipped recipes are found, `recipes/h_96f.yaml`; not the bases that they share."""
    root = shipped(RECIPES)
    files = (file.relative_to(root) for file in root.rglob("*.yaml"))
    return sorted(str(Path(RECIPES) / file) for file in files if "_base_" not in file.parts)


def shipped_weights() -> list[str]:
    """The names of the weights that come with the package, `sfa:motion-tiny`."""
    return sorted(WEIGHTS_PREFIX + file.stem for file in _WEIGHTS.glob("*.safetensors"))


def weights_path(source: str) -> Path:
    """The file of weights: that of the package for `sfa:NAME`, else `source` itself. Raises RecipeError for a name that
    the package does not have."""
    if not source.startswith(WEIGHTS_PREFIX):
        return Path(source)
    if source not in shipped_weights():
        raise RecipeError(f"no weights {source} come with the package: it has {', '.join(shipped_weights())}")
    return _WEIGHTS / f"{source.removeprefix(WEIGHTS_PREFIX)}.safetensors"
