"""Each recipe that is shipped loads, and its header says what a user has to know before starting it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sfa_dist.recipe import STAGE_BLOCKS, STAGE_NAMES, load_recipe
from sfa_dist.recipe_source import find, leaves, merge, read_source
from sfa_dist.recipe_yaml import Node, parse, plain

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

PAPER_RECIPES = {  # frames of stage 2, temporal depth
    "b_32f": (32, 4),
    "l_128f": (128, 24),
    "h_96f": (96, 4),
    "g_48f": (48, 20),
    "g_lt4_48f": (48, 4),
    "b_80f_11gb": (80, 4),
}

each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


@each
def test_it_loads_without_any_environment(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert recipe.name == path.stem
    for stage in (recipe.stage1, recipe.stage2):
        if stage is not None:
            assert stage.data.train
            assert stage.batch.size % stage.batch.micro == 0


@each
@pytest.mark.parametrize("part", ["command", "hardware", "memory", "time", "paper"])
def test_its_header_has_all_parts(path: Path, part: str) -> None:
    assert re.search(rf"^# {part}:\s+\S", header(path), re.IGNORECASE | re.MULTILINE)


@each
def test_its_header_gives_a_command_that_runs_it(path: Path) -> None:
    commands = header(path)
    assert f"--recipe recipes/{path.name}" in commands or f"make {path.stem}" in commands
    for script in re.findall(r"sbatch (slurm/\S+\.sh)", commands):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_paper_recipes_have_the_papers_sizes(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", environ={"SFA_DATA": "/shards"}).recipe
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    frames, depth = PAPER_RECIPES[name]
    assert (recipe.stage1.frames, recipe.stage2.frames) == (8, frames)
    assert recipe.stage1.model == recipe.stage2.model
    assert recipe.stage1.model.temporal_depth == depth
    assert recipe.stage2.data.train == ["/shards/kinetics400/train-*.tar"]
    assert (recipe.stage2.optimizer.name, recipe.stage2.batch.size, recipe.stage2.schedule.epochs) == ("sgd", 64, 30)
    assert f"{frames}" in header(ROOT / "recipes" / f"{name}.yaml")


@each
def test_it_says_only_what_differs_from_its_bases(path: Path) -> None:
    own = parse(path.read_text(encoding="utf-8"), place=lambda line: f"line {line}")
    names = plain(own).get("_base_", [])
    base = Node({}, "")
    for name in [names] if isinstance(names, str) else names:
        base = merge(base, read_source(path.parent / name, (), {"SFA_DATA": "data"}))
    for leaf in leaves(own):
        twin, depth = find(base, keys := leaf.key.split("."))
        assert depth < len(keys) or plain(twin) != plain(leaf), f"{leaf.place}: {leaf.key} is the base's"


@pytest.mark.parametrize("path", [*RECIPES, *(ROOT / "recipes" / "_base_").glob("*.yaml")], ids=lambda path: path.stem)
def test_its_keys_stand_in_the_schemas_order(path: Path) -> None:
    order = ["_base_", "name", "seed", *STAGE_BLOCKS, *STAGE_NAMES, "test", "log"]
    keys = list(plain(parse(path.read_text(encoding="utf-8"), place=str)))
    assert keys == sorted(keys, key=order.index)
