"""Each table and figure of the paper as rows: what is trained, and the numbers that the paper prints.

Frames are the paper's; a scale has its own (scales.py). Source of the numbers: the SFA-ViViT paper's tables; accuracies
in percent, costs as multiples of the baseline's training time. Figures print no numbers. `cache` is a study of our own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# What distinguishes the rows of Table 1 from SFA: overrides of keys of its recipe.
FROM_IMAGE = ("stage1.schedule.epochs=0",)
WITHOUT_ADAPTER = ("stage2.adapter=null",)
TRAINED_TRUNK = ("stage2.freeze_trunk=false",)
VIEWS = "stage2.cache.views="  # Rows of the cache study.

K400, K600, MIT = "kinetics400", "kinetics600", "moments_in_time"
SSV2, ELSE, EPIC = "something_something_v2", "something_else", "epic_kitchens100"
FEW = 8  # Frames of stage 1.


@dataclass(frozen=True)
class Paper:
    """What the paper prints: top-1 and top-5 in percent, the cost as a multiple of the baseline's."""

    acc1: float | None = None
    acc5: float | None = None
    cost: float | None = None
    steps: int | None = None  # Until the best accuracy.


@dataclass(frozen=True)
class Training:
    """What a row trains: a model of a `size` on a data set, by SFA or end to end, with further overrides `sets`.

    `data` is "" where the paper's data set does not matter: then it is the scale's.
    """

    frames: int
    size: str = "L"
    data: str = ""
    few: int = FEW
    end_to_end: bool = False
    sets: tuple[str, ...] = ()
    stage1_data: str = ""  # The data set of stage 1, where it is another one.


@dataclass(frozen=True)
class Row:
    """One row. `against` is the row that its cost is compared with; `left_out` says why it is not trained."""

    name: str
    words: str
    paper: Paper
    training: Training | None = None
    against: str | None = None
    left_out: str = ""


@dataclass(frozen=True)
class Experiment:
    """A table or figure. `paper` says on which data and model the paper has it."""

    name: str
    title: str
    paper: str
    rows: tuple[Row, ...]


def _table1() -> Experiment:
    sfa = Training(128)
    image = replace(sfa, sets=FROM_IMAGE)
    rows = (
        Row("-", "end to end", Paper(64.45, 87.48, 1.0), replace(sfa, end_to_end=True), "-"),
        Row(
            "I",
            "spatial frozen, no adapter",
            Paper(27.75, 56.73, 0.5),
            replace(image, sets=(*FROM_IMAGE, *WITHOUT_ADAPTER)),
            "-",
        ),
        Row(
            "II",
            "temporal frozen",
            Paper(25.80, 53.07, 0.5),
            left_out="no key freezes the temporal encoder alone; its gradients pass through it, so it saves no time",
        ),
        Row("III", "spatial frozen, adapter", Paper(38.77, 68.93, 0.53), image, "-"),
        Row(
            "IV",
            "III, temporal encoder from VideoMAE",
            Paper(58.54, 85.83, 2.51),
            left_out="VideoMAE is not part of this package",
        ),
        Row("V", "SFA: III, both encoders from stage 1", Paper(63.85, 87.62, 0.62), sfa, "-"),
        Row("VI", "V with nothing frozen", Paper(64.13, 87.35, 1.37), replace(sfa, sets=TRAINED_TRUNK), "-"),
    )
    return Experiment("table1", "Table 1: what SFA consists of", "ViViT-L 128f on Something-Something v2", rows)


def _table2() -> Experiment:
    names = {K400: "K400", SSV2: "SSv2"}
    numbers = {
        (K400, K400): Paper(82.81, 93.98),
        (SSV2, K400): Paper(76.79, 92.35),
        (SSV2, SSV2): Paper(63.85, 87.62),
        (K400, SSV2): Paper(44.71, 74.53),
    }
    rows = tuple(
        Row(
            f"{names[source]} -> {names[target]}",
            "stage 1 of the same data" if source == target else "stage 1 of the other data",
            paper,
            Training(128, data=target, stage1_data="" if source == target else source),
        )
        for (source, target), paper in numbers.items()
    )
    return Experiment("table2", "Table 2: stage 1 of another data set", "ViViT-L 128f", rows)


def _table3() -> Experiment:
    numbers = {
        "L": Paper(79.64, 91.73, steps=48_000),
        "H": Paper(81.02, 93.09, steps=39_000),
        "g": Paper(81.81, 94.55, steps=29_000),
    }
    rows = tuple(Row(f"ViViT-{size}", "SFA", paper, Training(48, size)) for size, paper in numbers.items())
    return Experiment("table3", "Table 3: larger backbones", "48f on Kinetics-400, from JFT weights", rows)


def _pair(size: str, frames: int, data: str, baseline: Paper, ours: Paper) -> tuple[Row, Row]:
    """The baseline and SFA on one data set."""
    name = f"ViViT-{size} {frames}f" + (f", {data}" if data else "")
    training = Training(frames, size, data)
    return (
        Row(name, "end to end", baseline, replace(training, end_to_end=True), name),
        Row(f"{name} + SFA", "SFA", ours, training, name),
    )


def _table5() -> Experiment:
    rows = (
        *_pair("L", 128, K400, Paper(82.59, 93.09, 1.0), Paper(82.78, 94.03, 0.56)),
        *_pair("L", 128, K600, Paper(83.29, 95.82, 1.0), Paper(83.47, 95.29, 0.56)),
        *_pair("H", 96, K400, Paper(84.21, 94.66, 1.0), Paper(84.42, 94.72, 0.57)),
        *_pair("H", 96, K600, Paper(84.18, 95.68, 1.0), Paper(84.39, 96.20, 0.57)),
        *_pair("H", 96, MIT, Paper(38.17, 62.84, 1.0), Paper(39.96, 64.39, 0.59)),
    )
    return Experiment("table5", "Table 5: SFA and end to end", "ViViT-L 128f and ViViT-H 96f", rows)


def _table6() -> Experiment:
    rows = (
        *_pair("L", 128, SSV2, Paper(64.45, 87.48, 1.0), Paper(63.85, 87.62, 0.62)),
        *_pair("L", 128, ELSE, Paper(53.14, 73.98, 1.0), Paper(53.60, 74.47, 0.62)),
        *_pair("L", 128, EPIC, Paper(43.53, None, 1.0), Paper(43.54, None, 0.63)),
    )
    return Experiment("table6", "Table 6: SFA and end to end, further data sets", "ViViT-L 128f", rows)


def _fig1() -> Experiment:
    sizes = (("B", 128), ("L", 128), ("H", 96))
    rows = tuple(row for size, frames in sizes for row in _pair(size, frames, "", Paper(), Paper()))
    return Experiment("fig1", "Figure 1: accuracy against cost", "ViViT-B, L and H", rows)


def _fig3() -> Experiment:
    starts = ((0, "image checkpoint"), *((few, f"{few}f") for few in (2, 4, 8, 16, 32, 48)))
    rows = tuple(
        Row(
            f"{name} -> {frames}f",
            "stage 1 of so many frames" if few else "no stage 1",
            Paper(),
            Training(frames, few=few) if few else Training(frames, sets=FROM_IMAGE),
        )
        for frames in (64, 96, 128)
        for few, name in starts
    )
    return Experiment("fig3", "Figure 3: frames of stage 1", "ViViT on Kinetics-400", rows)


def _fig4() -> Experiment:
    rows = tuple(row for frames in (64, 128) for row in _pair("L", frames, "", Paper(), Paper()))
    return Experiment("fig4", "Figure 4: the head start", "ViViT on Kinetics-400", rows)


def _cache() -> Experiment:
    """Not the paper's: what stage 2 gains from stored views, and what it loses."""
    live = Training(128)
    rows = (
        Row("-", "end to end", Paper(), replace(live, end_to_end=True), "-"),
        Row("live", "SFA, the trunk runs in every epoch", Paper(), live, "-"),
        *(
            Row(f"K = {views}", "SFA from the feature cache", Paper(), replace(live, sets=(f"{VIEWS}{views}",)), "-")
            for views in (1, 2, 4, 8)
        ),
    )
    title = "The feature cache: K stored views of each video, and live training"
    return Experiment("cache", title, "no feature cache; its SFA is the row live", rows)


EXPERIMENTS = {
    each.name: each
    for each in (_table1(), _table2(), _table3(), _table5(), _table6(), _fig1(), _fig3(), _fig4(), _cache())
}
