"""What an experiment is at a scale: the recipe of each training, its overrides, and the clips that it needs.

The scales `demo` and `quick` have generated clips, an eighth of the paper's frames, and half of those of stage 1. The
others are the data sets for which recipes are shipped, at the paper's sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sfa_dist.errors import UsageError
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.tools.experiments.rows import (
    ELSE,
    EPIC,
    FROM_IMAGE,
    K400,
    K600,
    MIT,
    SSV2,
    TRAINED_TRUNK,
    VIEWS,
    Experiment,
    Training,
)

DEMO = "recipes/reproduce/demo.yaml"
ALL, FEW = "stage2.frames", "stage1.frames"
# As recipes/_base_/end_to_end.yaml: one clip at a time, activations recomputed, no stage 2.
END_TO_END = ("batch.micro=1", "activation=checkpoint", "stage2=null")
ALL_TRAINED = ("stage2.batch.micro=1", "stage2.activation=checkpoint")  # The same where stage 2 trains its trunk.
SHIPPED = {
    (K400, "B"): "recipes/b_32f.yaml",
    (K400, "L"): "recipes/l_128f.yaml",
    (K400, "H"): "recipes/h_96f.yaml",
    (K400, "g"): "recipes/g_48f.yaml",
    (K600, "L"): "recipes/kinetics600/l_128f.yaml",
    (K600, "H"): "recipes/kinetics600/h_96f.yaml",
    (MIT, "H"): "recipes/moments_in_time/h_96f.yaml",
    (SSV2, "L"): "recipes/something_something_v2/l_128f.yaml",
    (ELSE, "L"): "recipes/something_else/l_128f.yaml",
    (EPIC, "L"): "recipes/epic_kitchens100/l_128f.yaml",
}
# Table 2: the recipe for stage 2 with another data set's stage 1, by (target, source).
CROSSED = {
    (K400, SSV2): "recipes/kinetics400/l_128f_from_something_something_v2.yaml",
    (SSV2, K400): "recipes/something_something_v2/l_128f_from_kinetics400.yaml",
}
DEMO_SIZES: Mapping[str, tuple[str, ...]] = {
    "B": ("model.width=64", "model.heads=2", "model.mlp=256", "model.depth=3"),
    "L": (),
    "H": ("model.width=128", "model.heads=4", "model.mlp=512", "model.depth=5"),
    "g": ("model.width=160", "model.heads=5", "model.mlp=640", "model.depth=6"),
}
TUBELET = 2
# The generated set that stands for a data set of the paper, by the end of its folder's name.
OTHER = "_other"
STANDS_FOR = {"": "", K400: "", SSV2: OTHER}
SPLITS = (("train", "train"), ("val", "test"), ("test", "test"))


@dataclass(frozen=True)
class ClipCounts:
    """Clips of each of the two sets to train and to test on, and images; a clip has so many frames."""

    train: int
    test: int
    images: int
    frames: int = 16


class LeftOutError(Exception):
    """A row that a scale does not have; the message says why."""


@dataclass(frozen=True)
class Resolved:
    """A training at a scale: a recipe and overrides. `stage1` is the one whose stage 1 it takes; None: its own."""

    recipe: str
    sets: tuple[str, ...]
    stage1: Resolved | None = None


@dataclass(frozen=True)
class Scale:
    """A data set with shipped recipes."""

    name: str

    def resolve(self, training: Training) -> Resolved:
        """The recipe of a training. Raises LeftOutError."""
        data = training.data or self.name
        if data != self.name:
            raise LeftOutError(f"its data are {data}: --scale {data}")
        if (data, training.size) not in SHIPPED:
            raise LeftOutError(f"no recipe of ViViT-{training.size} on {data} is shipped")
        recipe, first = SHIPPED[data, training.size], None
        if source := training.stage1_data:
            recipe, first = CROSSED[data, source], Resolved(SHIPPED[source, training.size], ())
        few = training.frames if FROM_IMAGE[0] in training.sets else training.few
        sets: tuple[str, ...] = (f"{ALL}={training.frames}", f"{FEW}={few}")
        if training.end_to_end:
            sets = (*END_TO_END, f"{FEW}={training.frames}")
        if TRAINED_TRUNK[0] in training.sets:
            sets = (*sets, *ALL_TRAINED)
        if any(text.startswith(VIEWS) for text in training.sets):
            sets = (*sets, *_mixup_of_features(recipe))
        return Resolved(recipe, (*sets, *training.sets), first)


def _mixup_of_features(recipe: str) -> tuple[str, ...]:
    """The overrides by which a recipe that mixes clips mixes their cached features instead; none where it does not."""
    stage = load_recipe(recipe).recipe.stage2
    if stage is None or stage.augment.mixup is None:
        return ()
    return ("stage2.augment.mixup=null", f"stage2.cache.mixup={stage.augment.mixup.alpha}")


@dataclass(frozen=True)
class SmallScale(Scale):
    """Generated clips, a `recipe` of all stages, and `sets` that change it; `epochs` are those of the baseline."""

    clips: ClipCounts
    epochs: int
    sets: tuple[str, ...] = ()
    recipe: str = DEMO

    def needs_other(self, experiment: Experiment) -> bool:
        """Whether an experiment needs the second generated set."""
        named = {name for row in experiment.rows if (of := row.training) for name in (of.data, of.stage1_data)}
        return any(STANDS_FOR.get(name) == OTHER for name in named)

    def resolve(self, training: Training) -> Resolved:
        """The recipe of a training. Raises LeftOutError."""
        frames, few = training.frames // 8, training.few // 2
        if few % TUBELET:
            raise LeftOutError(f"{training.few} frames are {few} here, which is no multiple of a tubelet's {TUBELET}")
        if FROM_IMAGE[0] in training.sets:  # Random positions of few steps, interpolated to many, are nearly equal.
            few = frames
        if few > frames:
            raise LeftOutError(f"stage 1 would see {few} frames here, and stage 2 only {frames}")
        common = (*self.sets, *DEMO_SIZES[training.size])
        sets = (*common, *self._clips_of(training.data), f"{ALL}={frames}", f"{FEW}={few}")
        if training.end_to_end:
            whole = ("stage2=null", f"{FEW}={frames}", f"stage1.schedule.epochs={self.epochs}")
            sets = (*common, *self._clips_of(training.data), *whole)
        first = None
        if training.stage1_data:
            first = Resolved(self.recipe, (*common, *self._clips_of(training.stage1_data), f"{FEW}={few}"))
        return Resolved(self.recipe, (*sets, *training.sets), first)

    def _clips_of(self, data: str) -> tuple[str, ...]:
        """The overrides that name the clips which stand for a data set of the paper."""
        if data not in STANDS_FOR:
            raise LeftOutError(f"no generated clips stand for {data}")
        folder = f"${{SFA_DATA:-data}}/{self.folder}"
        clips = [f'data.{split}=["{folder}{STANDS_FOR[data]}/{part}/*.tar"]' for split, part in SPLITS]
        images = [f'image.data.{split}=["{folder}/image_{part}/*.tar"]' for split, part in SPLITS[:2]]
        return (*clips, *images)

    @property
    def folder(self) -> str:
        """The folder of its first set in `${SFA_DATA:-data}`; the second one's ends with OTHER."""
        return f"reproduce_{self.name}"


SCALES: dict[str, Scale] = {
    "demo": SmallScale("demo", ClipCounts(train=6400, test=1000, images=8000), epochs=12),
    "quick": SmallScale(
        "quick",
        ClipCounts(train=1600, test=400, images=2000),
        epochs=12,
        sets=("batch.size=32", "batch.micro=16", "image.schedule.epochs=8"),
    ),
    **{data: Scale(data) for data in (K400, K600, MIT, SSV2, ELSE, EPIC)},
}


def find_scale(name: str) -> Scale:
    """A scale by its name. Raises UsageError."""
    if name not in SCALES:
        raise UsageError(f"--scale {name!r}: there are {', '.join(SCALES)}")
    return SCALES[name]
