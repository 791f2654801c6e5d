"""Where trials run: a shrunken copy of a recipe, and a few of its clips in small shards of their own.

The user's shards are only read, and nothing is written beside them, not even an index. `Workplace.notes` lists the
changes that make a recipe small enough for a CPU; keys given by `--set` stay as given.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfa_dist.boundary.file_names import RECIPE
from sfa_dist.data.shards.index_file import read_index
from sfa_dist.data.shards.shard_index import build_index
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.data.shards.shard_walk import CLIP_SUFFIXES, Label, ShardEntry, walk_shard
from sfa_dist.errors import DataError, RecipeError
from sfa_dist.models.vivit import dims_of
from sfa_dist.plan.flops import clip_flops
from sfa_dist.recipe.blocks import LABEL_HEADS, ModelBlock
from sfa_dist.recipe.schema import STAGE_NAMES, LoadedRecipe, Recipe, Stage1, StageBlock, dump_recipe

BATCH, MICRO, KEEP, SAVE_EVERY = 8, 2, 3, 2
SHARDS, EVAL_CLIPS = 3, 7
STEPS_PER_EPOCH = 3
CLIPS = STEPS_PER_EPOCH * BATCH - 1  # One less than full batches, so that each epoch ends with a padded batch.
SOURCE_SHARDS = 3  # Shards of the user's to take clips from, at most.
OWN_MODEL_KEYS = ("classes", "class_heads", "tubelet", "pooling", "drop_path", "subtract", "centre")
MAX_PARAMETERS = 50_000_000
MAX_RUN_SECONDS = 60.0
CPU_FLOPS = 2e10  # One core, roughly.
TINY = ModelBlock(
    size="tiny", classes=2, width=24, depth=1, heads=2, mlp=32, patch=8, image_size=16, temporal_depth=1
).model_dump()

Sample = tuple[str, dict[str, bytes]]


@dataclass
class Workplace:
    """A recipe that trials can run, in a folder with its clips; `clips` are the small shards by split."""

    folder: Path
    recipe: Recipe
    steps: int
    clips: dict[str, list[Path]]  # `stage1.train` -> shards
    notes: list[str] = field(default_factory=list)
    source: str = "the built-in recipe"
    real_shards: list[Path] = field(default_factory=list)  # The user's training shards, if all have an index.

    @property
    def stages(self) -> dict[str, StageBlock]:
        """The stages that a run trains."""
        return trained_stages(self.recipe)

    @property
    def recipe_file(self) -> Path:
        """The recipe for train.py."""
        return self.folder / RECIPE


def trained_stages(recipe: Recipe) -> dict[str, StageBlock]:
    """The stages of a recipe that are trained: all but a stage 1 whose weights are given."""
    stages = {name: stage for name in STAGE_NAMES if (stage := getattr(recipe, name)) is not None}
    return {name: stage for name, stage in stages.items() if not stage.given_weights}


def make_workplace(folder: Path, loaded: LoadedRecipe, source: str, steps: int, tiny_model: bool) -> Workplace:
    """Shrinks the recipe and copies a few of its clips.

    Raises RecipeError if it is too large for a CPU, DataError for shards that cannot be read.
    """
    if not tiny_model:
        _refuse_too_large(loaded.recipe, source, steps)
    folder.mkdir(parents=True, exist_ok=True)
    workplace = Workplace(folder, loaded.recipe, steps, {}, source=source)
    stages: dict[str, StageBlock] = {}
    for name in STAGE_NAMES:
        stage = getattr(loaded.recipe, name)
        if stage is not None:
            asked = {
                key.removeprefix(f"{name}.") for key, origin in loaded.origins.items() if origin.startswith("--set ")
            }
            stages[name] = _shrink(workplace, name, stage, asked, tiny_model)
    test = loaded.recipe.test.model_copy(update={"temporal_views": min(2, loaded.recipe.test.temporal_views)})
    log = loaded.recipe.log.model_copy(update={"every": 1, "wandb": "off"})
    workplace.recipe = Recipe.model_validate(
        loaded.recipe.model_copy(update={**stages, "test": test, "log": log}).model_dump()
    )
    workplace.recipe_file.write_text(dump_recipe(workplace.recipe))
    workplace.notes = [
        f"global batch {BATCH}, {steps} steps a stage, a checkpoint every {SAVE_EVERY} steps, wandb off, on CPU",
        *dict.fromkeys(workplace.notes),
    ]
    return workplace


def _shrink(workplace: Workplace, name: str, stage: StageBlock, asked: set[str], tiny_model: bool) -> StageBlock:
    """The stage with few clips, few steps and frequent checkpoints, but unchanged in the keys `asked` for."""
    size = stage.batch.size if "batch.size" in asked else min(stage.batch.size, BATCH)
    micro = stage.batch.micro if "batch.micro" in asked else min(stage.batch.micro, MICRO)
    micro = micro if size % micro == 0 else 1
    train = _cut(workplace, f"{name}.train", stage.data.train, STEPS_PER_EPOCH * size - 1)
    per_epoch = -(-_count(train) // size)
    epochs = -(-workplace.steps // per_epoch)
    changes: dict[str, Any] = {
        "batch": {"size": size, "micro": micro, "eval_micro": stage.batch.eval_micro},
        "schedule": {
            "epochs": epochs,
            "warmup_epochs": min(stage.schedule.warmup_epochs, epochs / 4),
            "max_steps": None if workplace.steps % per_epoch == 0 else workplace.steps,
        },
        "checkpoint": {"every_steps": SAVE_EVERY, "keep": KEEP},
        "data": {
            "train": _patterns(train),
            "val": _patterns(_cut(workplace, f"{name}.val", stage.data.val, EVAL_CLIPS)),
            "test": _patterns(_cut(workplace, f"{name}.test", stage.data.test, EVAL_CLIPS)),
            "workers": 0,
        },
    }
    if isinstance(stage, Stage1):
        changes |= _starting_weights(workplace, stage, tiny_model)
    if tiny_model:
        own = {key: getattr(stage.model, key) for key in OWN_MODEL_KEYS}
        changes["model"] = {**TINY, **own}
        changes["data"]["resize"] = 20
        workplace.notes.append("a tiny model in place of the recipe's (--tiny-model)")
    return _updated(stage, changes, asked)


def _starting_weights(workplace: Workplace, stage: Stage1, tiny_model: bool) -> dict[str, Any]:
    """Leaves out starting weights that do not fit a tiny model, or that would come over the network."""
    changes: dict[str, Any] = {}
    outside = stage.image_checkpoint is not None and stage.image_checkpoint != "stage:image"
    if outside and (tiny_model or str(stage.image_checkpoint).startswith("timm:")):
        changes["image_checkpoint"] = None
        workplace.notes.append("random starting weights in place of stage1.image_checkpoint")
    if stage.weights and tiny_model:
        changes["weights"] = None
        workplace.notes.append("stage 1 is trained, in place of stage1.weights")
    return changes


def _updated(stage: StageBlock, changes: dict[str, Any], asked: set[str]) -> StageBlock:
    values = stage.model_dump()
    for key, change in changes.items():
        if isinstance(change, dict):
            values[key] |= {
                name: value
                for name, value in change.items()
                if f"{key}.{name}" not in asked or name in ("train", "val", "test")
            }
        elif key not in asked:
            values[key] = change
    return type(stage).model_validate(values)


def _refuse_too_large(recipe: Recipe, source: str, steps: int) -> None:
    """Raises RecipeError if the model has too many parameters, or a run takes over MAX_RUN_SECONDS on a CPU core."""
    for name, stage in trained_stages(recipe).items():
        dims = dims_of(stage.model)
        parameters = dims.depth * (4 * dims.width**2 + 2 * dims.width * dims.mlp)
        clips = min(stage.batch.size, BATCH) * steps
        seconds = clips * clip_flops(stage) / CPU_FLOPS
        if parameters > MAX_PARAMETERS or seconds > MAX_RUN_SECONDS:
            raise RecipeError(
                f"{name} of {source} is too large for a CPU: about {parameters / 1e6:,.0f}M parameters in the spatial "
                f"encoder and {seconds:,.0f} s for {steps} steps, and each fault takes two runs; "
                "add --tiny-model to try the same recipe with a tiny model"
            )


# ---------------------------------------------------------------------------------------------------- clips


def _cut(workplace: Workplace, split: str, patterns: Sequence[str], count: int) -> list[Path]:
    """Writes small shards with at most `count` of the clips in the shards that the patterns name."""
    if not patterns:
        return []
    try:
        paths = [path for path in expand_shards(patterns) if isinstance(path, Path)]
    except DataError as error:
        raise DataError(f"{split.replace('.', '.data.', 1)}: {error}") from error
    if not paths:
        raise DataError(f"{split.replace('.', '.data.', 1)}: names no shard on this machine to copy clips from")
    folder = workplace.folder / "clips" / split
    samples = list(take_samples(paths, count))
    if not samples:
        raise DataError(f"{split}: no usable clip in {', '.join(map(str, paths[:SOURCE_SHARDS]))}")
    shards = write_shards(folder, samples)
    _copy_classes(paths[0].parent, folder)
    workplace.clips[split] = shards
    workplace.notes.append(
        f"{split}: {len(samples)} clips, copied from {min(SOURCE_SHARDS, len(paths))} of {len(paths)} shards"
    )
    if split.endswith(".train") and not workplace.real_shards and _all_indexed(paths):
        workplace.real_shards = paths
    return shards


def take_samples(paths: Sequence[Path], count: int) -> Iterable[Sample]:
    """Up to `count` usable samples, evenly spaced over at most SOURCE_SHARDS of the shards. Writes nothing."""
    chosen = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, min(SOURCE_SHARDS, len(paths)))]
    usable = [
        (path, sample)
        for path in chosen
        for sample in _entry(path).samples
        if not sample.error and sample.label is not None
    ]
    positions = sorted({round(i) for i in np.linspace(0, len(usable) - 1, min(count, len(usable)))}) if usable else []
    for number, position in enumerate(positions):
        path, sample = usable[position]
        suffix = next(suffix for suffix in CLIP_SUFFIXES if suffix in sample.members)
        offset, size, _ = sample.members[suffix]
        with path.open("rb") as file:
            file.seek(offset)
            clip = file.read(size)
        yield f"{number:05d}", {suffix: clip, **_label_members(sample.label)}


def _label_members(label: Label | None) -> dict[str, bytes]:
    """A sample's json member, and its cls member if it has a single label."""
    if isinstance(label, tuple):
        return {"json": json.dumps(dict(zip(LABEL_HEADS, label, strict=True))).encode()}
    return {"json": json.dumps({"label": label}).encode(), "cls": str(label).encode()}


def write_shards(folder: Path, samples: Sequence[Sample]) -> list[Path]:
    """Writes the samples into SHARDS indexed shards, or fewer if there are fewer samples; returns their paths."""
    folder.mkdir(parents=True)
    parts = [part for part in np.array_split(np.arange(len(samples)), SHARDS) if len(part)]
    paths = []
    for number, part in enumerate(parts):
        paths.append(folder / f"part-{number:06d}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for key, members in (samples[i] for i in part):
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    build_index(paths)
    return paths


def _entry(path: Path) -> ShardEntry:
    """The shard's entry in its index, or, without an index, the result of a walk through the shard."""
    return read_index(path.parent).get(path.name) or walk_shard(path)


def _all_indexed(paths: Sequence[Path]) -> bool:
    known = {folder: read_index(folder) for folder in {path.parent for path in paths}}
    return all(path.name in known[path.parent] for path in paths)


def _copy_classes(source: Path, folder: Path) -> None:
    """Copies the class list, which a run compares between its splits."""
    manifest = source / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_bytes())
        names = {key: content.get(key) for key in ("classes", "heads")}
        (folder / "manifest.json").write_text(json.dumps({"version": 1, **names}))


def _patterns(shards: Sequence[Path]) -> list[str]:
    return [str(shards[0].parent / "*.tar")] if shards else []


def _count(shards: Sequence[Path]) -> int:
    return sum(
        len(entry.samples) for folder in {path.parent for path in shards} for entry in read_index(folder).values()
    )
