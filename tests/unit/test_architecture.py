"""Which module may know which: held on the syntax tree, so that no import has to run."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sfa_dist.boundary import file_names

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sfa_dist"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# Imports go from a later layer to an earlier one, or stay inside one package.
LAYERS = (
    ("errors",),
    ("boundary",),
    ("recipe",),
    ("models", "data", "parallel"),
    ("checkpoint", "plan"),
    ("run",),
    ("training",),
    ("stages",),
    ("inference", "train"),
    ("chaos",),
    ("tools",),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / PACKAGE)))


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def part_of(file: Path) -> str:
    """`models/vit.py` -> models, `train.py` -> train."""
    return file.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


@cache  # Each file is asked ten times; its names are few, its tree is large and is not kept.
def imports(file: Path) -> tuple[str, ...]:
    """Every module that a file imports, anywhere in it, with full names."""
    names: list[str] = []
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            # `from torch import distributed` imports torch.distributed as much as `import torch.distributed` does.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def imports_of(file: Path, module: str) -> list[str]:
    return [name for name in imports(file) if name == module or name.startswith(module + ".")]


def own_imports(file: Path) -> Iterator[str]:
    """The parts of the package (models, train, ...) that a file imports."""
    for name in imports_of(file, PACKAGE):
        first = name.split(".")[1] if "." in name else "__init__"
        if first in LAYER_OF:  # The others are values of sfa_dist/__init__.py, such as __version__.
            yield first


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, node) of every call by name."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_module_has_a_layer() -> None:
    assert {part_of(file) for file in FILES} - {"__init__"} == set(LAYER_OF)


@each_file
def test_imports_run_one_way(file: Path) -> None:
    if (part := part_of(file)) == "__init__":
        assert imports(file) == ()
        return
    for imported in own_imports(file):
        assert imported == part or LAYER_OF[imported] < LAYER_OF[part], f"{part} imports {imported}"


def test_the_root_holds_what_it_must() -> None:
    """A new module goes into the package that it belongs to."""
    assert {file.name for file in (ROOT / PACKAGE).glob("*.py")} == {"__init__.py", "errors.py", "train.py"}


def test_models_know_nothing_of_ranks() -> None:
    for file in (ROOT / PACKAGE / "models").rglob("*.py"):
        assert not imports_of(file, "torch.distributed")
        assert "distributed" not in {node.attr for node in ast.walk(tree_of(file)) if isinstance(node, ast.Attribute)}


def test_generated_clips_need_nothing_else_of_the_package() -> None:
    allowed = ("errors", "recipe", "data.motion", "data.sampling.randomness")
    files = list((ROOT / PACKAGE / "data" / "motion").glob("*.py"))
    assert files
    for file in files:
        for name in imports_of(file, PACKAGE):
            assert name.removeprefix(f"{PACKAGE}.").startswith(allowed), f"{file.name} imports {name}"


def test_one_file_imports_deepspeed() -> None:
    assert [part.name for part in FILES if imports_of(part, "deepspeed")] == ["zero.py"]


def test_one_file_touches_the_environment() -> None:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}

    def touches(file: Path) -> bool:
        used = {node.attr for node in ast.walk(tree_of(file)) if isinstance(node, ast.Attribute)}
        return bool(used & names) or any(name.startswith("os.") and name[3:] in names for name in imports(file))

    assert [str(file.relative_to(ROOT)) for file in FILES if touches(file)] == ["sfa_dist/parallel/environment.py"]


@pytest.mark.fault(25, 42)
@each_file
def test_nothing_is_loaded_by_pickle(file: Path) -> None:
    """Invariant 7. `pickle` is imported once, for the name of an error that torch.load raises."""
    assert set(imports_of(file, "pickle")) <= {"pickle"}
    for forbidden in ("cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"):
        assert not imports_of(file, forbidden)
    for name, call in calls(file):
        where = f"{file.name}:{call.lineno}: {name}"
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        assert not re.fullmatch(r"pickle\.\w+|.*\.Unpickler", name), where
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"), where
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True", where
        if "allow_pickle" in keywords:
            assert ast.unparse(keywords["allow_pickle"]) == "False", where
        if "weights_only" in keywords:
            assert ast.unparse(keywords["weights_only"]) == "True", where


@each_file
def test_nothing_is_drawn_from_global_random_numbers(file: Path) -> None:
    """But from generators that are keyed by (seed, epoch, sample) or (seed, stage, step): so no generator's state has
    to be saved, and none depends on the number of ranks. torch's own is seeded before each use."""
    if file.is_relative_to(ROOT / PACKAGE / "chaos"):  # Chance is its business, and no run's: it has its own `--seed`.
        return
    assert not imports_of(file, "random")
    for name, call in calls(file):
        drawn = name.removeprefix("numpy.").removeprefix("np.")
        if drawn.startswith("random."):
            assert drawn in ("random.Generator", "random.Philox", "random.default_rng"), f"{file}:{call.lineno}: {name}"
            assert call.args or call.keywords, f"{file}:{call.lineno}: {name} without a seed"


@each_file
def test_webdataset_only_writes(file: Path) -> None:
    """Its decoders unpickle members by their suffix; our own reader goes by offsets and an allow-list."""
    assert set(imports_of(file, "webdataset")) <= {"webdataset.TarWriter"}


def dependencies() -> set[str]:
    """Import names of what setup.cfg lists, and of what comes with python."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    projects = {re.split(r"[<>=!~\[ ]", line)[0].lower() for text in listed for line in text.split("\n") if line}
    modules = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        for owner in owners
        if owner.lower().replace("_", "-") in {project.replace("_", "-") for project in projects}
    }
    assert {"torch", "yaml", "av", "sklearn"} <= modules
    return modules | projects


def test_no_module_bears_the_name_of_another_library() -> None:
    """train.py runs as a script: whatever lies beside it could shadow a library of the same name."""
    taken = set(sys.stdlib_module_names) | dependencies()
    names = {file.stem for file in FILES} | {file.parent.name for file in FILES}
    assert names & taken == set()


def test_train_puts_the_root_in_place_of_its_folder_before_all_else() -> None:
    body = tree_of(ROOT / PACKAGE / "train.py").body
    first_own = next(
        i for i, node in enumerate(body) if PACKAGE in ast.unparse(node) and isinstance(node, ast.ImportFrom)
    )
    before = [ast.unparse(node) for node in body[:first_own]]
    assert any("sys.path[0] = " in text for text in before)


@each_file
def test_everything_public_says_what_it_is(file: Path) -> None:
    tree = tree_of(file)
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"line {node.lineno}: {node.name}"


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from sfa_dist.tools.cli import build_parser\n"
        "assert 'plan' in build_parser().format_help()\n"
        "assert not {'torch', 'deepspeed', 'av'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_recipe_is_read_without_torch() -> None:
    code = (
        "import sys\n"
        "from sfa_dist import train\n"
        "assert train.main(['--recipe', 'recipes/demo.yaml', '--print-recipe']) == 0\n"
        "heavy = {'torch', 'deepspeed', 'timm', 'numpy', 'av', 'wandb', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_names_of_run_files_stand_once() -> None:
    """Strings that are a whole name; sentences may tell one. Other folders have a `lock` too."""
    names = {value for name, value in vars(file_names).items() if name.isupper()} - {
        file_names.LOCK
    }  # Other locks too.
    home = ROOT / PACKAGE / "boundary" / "file_names.py"
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for file in FILES
        if file != home
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []
