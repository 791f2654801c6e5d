"""Each recipe that is shipped loads, and its header says what a user has to know before starting it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sfa_dist.recipe.schema import STAGE_BLOCKS, STAGE_NAMES, load_recipe
from sfa_dist.recipe.source import find, leaves, merge, read_source
from sfa_dist.recipe.strict_yaml import Node, parse, plain

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "recipes"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "_base_")


def own_keys(path: Path) -> dict[str, object]:
    return plain(parse(path.read_text(encoding="utf-8"), source=str))


def title(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


BASELINES = [path for path in RECIPES if path.stem.endswith("_baseline")]

L, H = "timm:vit_large_patch16_224.augreg_in21k", "timm:vit_huge_patch14_224.orig_in21k"
# The paper's rows: recipe -> table's frames, temporal depth, image checkpoint or source of stage 1.
PAPER_RECIPES = {
    "b_32f": (32, 4, "timm:vit_base_patch16_224.augreg_in21k"),
    "l_128f": (128, 24, L),
    "h_96f": (96, 4, H),
    "g_48f": (48, 20, None),
    "g_lt4_48f": (48, 4, None),
    "b_80f_11gb": (80, 4, "timm:vit_base_patch16_224.augreg_in21k"),
    "kinetics400/l_48f": (48, 24, L),
    "kinetics400/h_48f": (48, 4, H),
    "kinetics400/l_128f_from_something_something_v2": (128, 4, "something_something_v2/l_128f"),
    "kinetics600/l_128f": (128, 24, L),
    "kinetics600/h_96f": (96, 4, H),
    "moments_in_time/h_96f": (96, 4, H),
    "something_something_v2/l_128f": (128, 4, L),
    "something_something_v2/l_128f_from_kinetics400": (128, 24, "l_128f"),
    "something_else/l_128f": (128, 4, L),
    "epic_kitchens100/l_128f": (128, 4, L),
}
# Frames a second where the official data has a fixed rate; Moments in Time and EPIC-Kitchens-100 keep each video's own.
RATES = {"kinetics400": 25.0, "kinetics600": 25.0, "something_something_v2": 12.0, "something_else": 12.0}
# The official settings (scenic's configurations, ViViT Table 7) by data set: classes, epochs, learning rates, stride,
# resize and crop, flip, colour, grey, RandAugment, mixup, label smoothing, drop-path.
OFFICIAL = {
    "kinetics400": (400, 30, {"B": 0.05, "L": 0.1, "H": 0.1, "g": 0.1}, 2, (256, 224), 0.5, 0.8, 0.1, None, None, 0, 0),
    "kinetics600": (600, 30, {"L": 0.05, "H": 0.1}, 2, (256, 224), 0.5, 0.8, 0.1, None, None, 0, 0),
    "moments_in_time": (339, 10, {"H": 0.25}, 1, (256, 224), 0.5, 0.8, 0.0, None, None, 0, 0),
    "something_something_v2": (174, 35, {"L": 0.4}, 1, (288, 256), 0.0, 0.0, 0.0, (2, 20), 0.3, 0.3, 0.3),
    "epic_kitchens100": (397, 50, {"L": 0.5}, 1, (256, 224), 0.5, 0.0, 0.0, (2, 15), 0.1, 0.2, 0.2),
    "something_else": (174, 35, {"L": 0.4}, 1, (288, 256), 0.0, 0.0, 0.0, (2, 20), 0.3, 0.3, 0.3),
}

each = pytest.mark.parametrize("path", RECIPES, ids=title)


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


@each
def test_it_loads_without_any_environment(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert recipe.name == (path.stem if path.parent == FOLDER else title(path).replace("/", "_"))
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
    assert f"--recipe recipes/{title(path)}.yaml" in commands or f"make {path.stem}" in commands
    for script in re.findall(r"sbatch (slurm/\S+\.sh)", commands):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_paper_recipes_have_the_papers_sizes(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml").recipe
    assert recipe.stage1 is not None
    assert recipe.stage2 is not None
    frames, depth, source = PAPER_RECIPES[name]
    assert (recipe.stage1.frames, recipe.stage2.frames) == (8, frames)
    assert recipe.stage1.model == recipe.stage2.model
    assert recipe.stage1.model.temporal_depth == depth
    assert (recipe.stage2.optimizer.name, recipe.stage2.batch.size) == ("sgd", 64)
    assert f"{frames}" in header(FOLDER / f"{name}.yaml")
    if source is None or source.startswith("timm:"):
        assert (recipe.stage1.image_checkpoint, recipe.stage1.weights) == (source, None)
        return
    # Table 2: the weights of another recipe's stage 1 fit, trunk and temporal encoder, as they are.
    origin = load_recipe(FOLDER / f"{source}.yaml").recipe
    assert recipe.stage1.weights == f"runs/{origin.name}/stage1/weights.safetensors"
    assert origin.stage1 is not None
    same = {"classes": recipe.stage2.model.classes, "drop_path": recipe.stage2.model.drop_path}
    assert origin.stage1.model.model_copy(update=same) == recipe.stage2.model
    assert origin.stage1.model.classes != recipe.stage2.model.classes


@pytest.mark.parametrize("path", RECIPES, ids=title)
def test_official_settings(path: Path) -> None:
    """Of the data set that the shards are of; a stage 1 taken from another one brings its resolution."""
    recipe = load_recipe(path, environ={"SFA_DATA": "/shards"}).recipe
    for stage in filter(None, (recipe.stage1, recipe.stage2)):
        data_set = stage.data.train[0].removeprefix("/shards/").split("/")[0]
        if data_set not in OFFICIAL:
            assert path.stem in ("demo", "own_videos")
            continue
        classes, epochs, rates, stride, sides, *rest = OFFICIAL[data_set]
        assert path.parent in (FOLDER, FOLDER / data_set)
        assert [pattern.split("/")[2] for pattern in (*stage.data.train, *stage.data.val)] == [data_set] * 2
        assert stage.data.val == stage.data.test
        assert stage.model.classes == classes or "shot" in path.stem
        assert (stage.schedule.epochs, stage.schedule.warmup_epochs) == (epochs, 2.5)
        assert stage.data.fps == RATES.get(data_set)
        assert (stage.optimizer.lr, stage.data.stride) == (rates[stage.model.size], stride)
        assert (stage.data.resize, stage.model.image_size) == sides or "_from_" in path.stem
        augment, rand = stage.augment, stage.augment.rand_augment
        found = [augment.flip, augment.color, augment.gray, rand and (rand.layers, rand.magnitude)]
        found += [augment.mixup and augment.mixup.alpha, stage.optimizer.label_smoothing, stage.model.drop_path]
        assert (found, augment.scale_jitter) == (rest, [0.9, 1.33])
        assert (stage.data.mean, stage.data.std) == ([0.5] * 3, [0.5] * 3)
        optimizer = stage.optimizer
        assert (optimizer.momentum, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.0, 1.0)


@pytest.mark.parametrize("path", BASELINES, ids=title)
def test_a_baseline_is_its_recipe_end_to_end(path: Path) -> None:
    """One stage with all frames of stage 2, everything else equal; that is what the paper's tables compare."""
    baseline = load_recipe(path).recipe
    twin = path.with_stem(path.stem.removesuffix("_baseline"))
    ours = load_recipe(twin if twin.exists() else FOLDER / twin.name).recipe
    assert baseline.stage2 is None
    assert baseline.stage1 is not None
    assert ours.stage1 is not None
    assert ours.stage2 is not None
    assert baseline.stage1.frames == ours.stage2.frames
    same = ("model", "data", "augment", "optimizer", "schedule", "engine")
    assert all(getattr(baseline.stage1, block) == getattr(ours.stage1, block) for block in same)
    assert baseline.stage1.image_checkpoint == ours.stage1.image_checkpoint
    assert baseline.stage1.batch.size == ours.stage1.batch.size
    assert (baseline.test, baseline.seed) == (ours.test, ours.seed)


def test_no_two_recipes_share_a_run_directory() -> None:
    names = [load_recipe(path).recipe.name for path in RECIPES]
    assert sorted(names) == sorted(set(names))


def test_no_recipe_is_another_under_a_second_name() -> None:
    assert [title(path) for path in RECIPES if set(own_keys(path)) <= {"_base_"}] == []


@each
def test_it_says_only_what_differs_from_its_bases(path: Path) -> None:
    own = parse(path.read_text(encoding="utf-8"), source=lambda line: f"line {line}")
    names = plain(own).get("_base_", [])
    base = Node({}, "")
    for name in [names] if isinstance(names, str) else names:
        base = merge(base, read_source(path.parent / name, (), {"SFA_DATA": "data"}))
    for leaf in leaves(own):
        twin, depth = find(base, keys := leaf.key.split("."))
        assert depth < len(keys) or plain(twin) != plain(leaf), f"{leaf.source}: {leaf.key} is the base's"


@pytest.mark.parametrize("path", [*RECIPES, *(FOLDER / "_base_").glob("*.yaml")], ids=title)
def test_its_keys_stand_in_the_schemas_order(path: Path) -> None:
    order = ["_base_", "name", "seed", *STAGE_BLOCKS, *STAGE_NAMES, "test", "log"]
    keys = list(plain(parse(path.read_text(encoding="utf-8"), source=str)))
    assert keys == sorted(keys, key=order.index)
