"""`sfa init`: writes a commented recipe for your own clips, filled in from the manifest of `sfa pack`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sfa_dist.errors import DataError, UsageError
from sfa_dist.recipe.schema import Recipe

BASE = "recipes/own_videos.yaml"
_EPILOG = """\
examples:
  sfa init mine.yaml --shards data/own
  sfa init mine.yaml --shards data/own --train fold1 --test fold2
"""
_TRAIN = ("train", "training", "shard")
_TEST = ("test", "testing", "val", "valid", "validation")
_VAL = ("val", "valid", "validation", "test", "testing")
_PATTERN_CHARACTERS = "*?[]{}$"
_FRAMES = 16  # Of a clip, at most: those of BASE.
_TUBELET = 2  # That of BASE; the frames of a clip are a multiple of it.
_COVERED = 0.75  # The share of a video that a clip spans, if whole strides allow it.
_BATCH = 16  # That of BASE.
_STEPS, _LEAST_EPOCHS = 200, 4  # 200 steps of 16 clips were enough for a few hundred.
_APART = 0.5  # Seconds between the two frames of a tubelet from which on a line says that they are far apart.


class Span(NamedTuple):
    """The frames of a stage's clip: `frames`, `stride` apart."""

    frames: int
    stride: int

    @property
    def length(self) -> int:
        """Frames of the video from the first of them to the last, both included."""
        return (self.frames - 1) * self.stride + 1


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "init",
        help="write a commented recipe for your own packed clips",
        description="Writes a recipe for clips that sfa pack has packed: their classes and shards, frames and strides "
        f"that fit their lengths, and epochs that fit their number, on top of {BASE}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="the YAML file to write")
    parser.add_argument("--shards", type=Path, required=True, metavar="FOLDER", help="the folder of the packed shards")
    parser.add_argument("--train", metavar="PREFIX", help="the pack to train on (default: train, or the only one)")
    parser.add_argument("--test", metavar="PREFIX", help="the pack to test on (default: test, or val)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the recipe and prints its main facts. Raises UsageError and DataError."""
    if arguments.recipe.exists():
        raise UsageError(f"{arguments.recipe} exists already: give another name, or remove it")
    if arguments.recipe.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{arguments.recipe}: a recipe's name ends with .yaml")
    if odd := sorted(set(str(arguments.shards)) & set(_PATTERN_CHARACTERS)):
        raise UsageError(f"--shards {arguments.shards}: {odd[0]} is special in a recipe: rename the folder")
    manifest = read_manifest(arguments.shards)
    train, val, test = choose_packs(list(manifest["packs"]), arguments.train, arguments.test)
    facts = manifest["packs"][train].get("clips")
    if not facts or not facts.get("frames"):
        raise DataError(f"{arguments.shards}: the lengths of its clips are unknown: pack them again with --overwrite")
    span = fitting_span(facts["frames"]["quartile"])
    text = recipe_text(arguments, manifest, (train, val, test), span)
    try:
        arguments.recipe.parent.mkdir(parents=True, exist_ok=True)
        arguments.recipe.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{arguments.recipe} cannot be written ({error.strerror}): give another path") from error
    name = shlex.quote(str(arguments.recipe))
    print(
        f"{arguments.recipe}: {len(manifest['classes'])} classes, {manifest['packs'][train]['samples']} training clips"
    )
    print(f"  {_clip_line(span, facts['lengths'])}")
    if facts["fps"] and (apart := span.stride / facts["fps"]) > _APART:
        print(f"  the two frames of a tubelet are {apart:.1f} s apart, too far for most motion: cut the videos shorter")
    if test is None:
        print("  there is no pack to test on: without clips that training has not seen there is no score")
    else:
        print(f"check in two minutes whether it can learn: sfa check-learning --recipe {name}")
    print(f"train it: sfa train --recipe {name}")
    return 0


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of packed clips with one label each. Raises DataError without one, UsageError for several heads."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        packs = {name: {**pack, "samples": int(pack["samples"])} for name, pack in manifest["packs"].items()}
        classes = manifest["classes"]
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}): pack the clips first, sfa pack LIST {folder}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is not a manifest of sfa pack ({error!r:.80}): pack the clips again") from error
    if not packs:
        raise DataError(f"{file} names no pack: pack the clips first, sfa pack LIST {folder}")
    if not isinstance(classes, list) or not classes:
        raise UsageError(
            f"{folder}: its clips have several labels each: start from recipes/epic_kitchens100/l_128f.yaml"
        )
    if len(classes) < 2:
        raise DataError(f"{folder}: all its clips are of one class: there is nothing to tell apart")
    return {**manifest, "packs": packs}


def choose_packs(names: list[str], train: str | None, test: str | None) -> tuple[str, str | None, str | None]:
    """The names of the packs for (train, val, test); None for val or test without a pack.

    Raises UsageError for a pack that does not exist, or if the one to train on is not clear.
    """
    for option, name in (("--train", train), ("--test", test)):
        if name is not None and name not in names:
            raise UsageError(f"{option} {name}: the packs are {', '.join(names)}")
    chosen = train or next((name for name in _TRAIN if name in names), names[0] if len(names) == 1 else None)
    if chosen is None:
        raise UsageError(f"it is not clear which of the packs {', '.join(names)} to train on: give --train")
    others = [name for name in names if name != chosen]
    found = test or next((name for name in _TEST if name in others), None)
    val = test or next((name for name in _VAL if name in others), None)
    if found == chosen:
        raise UsageError(f"--test {found} is the pack to train on: give another one")
    return chosen, val, found


def fitting_span(length: int) -> Span:
    """The most frames that cover enough of a video of `length` frames without looping; else those that cover most."""
    most = min(_FRAMES, max(_TUBELET, length // _TUBELET * _TUBELET))
    choices = [
        Span(frames, max(1, (length - 1) // (frames - 1)))
        for frames in range(most, max(_TUBELET, most // 2) - 1, -_TUBELET)
    ]
    enough = (span for span in choices if span.length >= _COVERED * length)
    return next(enough, max(choices, key=lambda span: span.length))


def fitting_epochs(clips: int) -> int:
    """The epochs of stage 2: enough steps for a few clips, and not much more than they need for many."""
    return max(_LEAST_EPOCHS, -(-_STEPS // -(-clips // _BATCH)))


def _clip_line(span: Span, lengths: Mapping[str, int]) -> str:
    short = sum(count for length, count in lengths.items() if int(length) < span.length)
    return f"{span.frames} frames span {span.length}; {short} of {sum(lengths.values())} clips are shorter and loop"


def _span_line(stage: str, span: Span, short: int, clips: int) -> str:
    return f"{stage}: {span.frames} frames span {span.length}; {short} of {clips} clips are shorter and loop"


def recipe_text(
    arguments: argparse.Namespace,
    manifest: Mapping[str, Any],
    packs: tuple[str, str | None, str | None],
    span: Span,
) -> str:
    """The text of the recipe, in YAML."""
    from sfa_dist.data.packing.annotations.rows import some, visible

    train, val, test = packs
    classes, facts = manifest["classes"], manifest["packs"][train]["clips"]
    frames, count = facts["frames"], manifest["packs"][train]["samples"]
    patterns = {
        name: _pattern(arguments.shards, pack, list(manifest["packs"]))
        for name, pack in (("train", train), ("val", val), ("test", test))
    }
    held_out = "" if test else " # none yet: pack clips that training does not see, or nothing is tested"
    batch = f"\nbatch:\n  size: {count}\n  micro: {count} # all of the few clips\n" if count < _BATCH else ""
    epochs = fitting_epochs(count)
    name = shlex.quote(str(arguments.recipe))
    before = f"# Before:   sfa check-learning --recipe {name}    checks whether it can learn them\n" if test else ""
    return f"""\
# A recipe for the clips in {visible(str(arguments.shards))}: {count} to train on, at {facts["fps"]:g} frames a second,
# of {_lengths(frames)}.
#
{before}# Command:  sfa train --recipe {name}
# After:    sfa predict clip.mp4 --run runs/{arguments.recipe.stem}
# Change:   augment.flip to 0.5 if a mirrored clip has the same meaning. All other keys are in the recipe of _base_.
#           For thousands of videos, or for scenes as people film them: take recipes/b_32f.yaml as _base_, which starts
#           from an image checkpoint, and remove the blocks batch and schedule of this file.

_base_: {BASE}

model:
  classes: {len(classes)} # {visible(some(classes, 8))}

data:
  train: {json.dumps(patterns["train"], ensure_ascii=False)}
  val: {json.dumps(patterns["val"], ensure_ascii=False)}{held_out}
  test: {json.dumps(patterns["test"], ensure_ascii=False)}
  stride: {span.stride} # {_clip_line(span, facts["lengths"])}

augment:
  flip: 0.0 # left and right may be the label
{batch}
schedule:
  epochs: {epochs} # {epochs * -(-count // _BATCH)} steps
  warmup_epochs: {max(0.05, round(epochs / 20, 2)):g}

stage1:
  frames: {span.frames}

stage2:
  frames: {span.frames}
  chunk_frames: auto
"""


def _lengths(frames: Mapping[str, int]) -> str:
    if frames["min"] == frames["max"]:
        return f"{frames['max']} frames"
    return f"{frames['min']} to {frames['max']} frames (median {frames['median']})"


def _pattern(folder: Path, pack: str | None, packs: list[str]) -> list[str]:
    if pack is None:
        return []
    longer = any(name.startswith(f"{pack}-") for name in packs)  # Shards of train-extra do not belong to train.
    return [f"{folder}/{pack}-{'[0-9]*' if longer else '*'}.tar"]


def recipe_lines(recipe: Recipe, facts: Mapping[str, Any], classes: int | None) -> list[str]:
    """How packed clips fit a recipe: their number of `classes` (None for several heads), and clips that loop."""
    lines = []
    for name in ("stage1", "stage2"):
        stage = getattr(recipe, name)
        if stage is None:
            continue
        if classes and stage.model.class_heads is None and stage.model.classes != classes:
            lines.append(f"{name}: model.classes is {stage.model.classes}, and the clips have {classes} classes")
        rate = stage.data.fps / facts["fps"] if isinstance(stage.data.fps, float) and facts["fps"] else 1.0
        span = Span(stage.frames, stage.data.stride)
        lengths = facts["lengths"].items()
        short = sum(count for length, count in lengths if int(length) * rate < span.length)
        total = sum(count for _, count in lengths)
        lines.append(_span_line(name, span, short, total))
    return lines
