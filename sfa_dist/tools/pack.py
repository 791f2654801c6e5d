"""`sfa pack`: videos and labels into indexed shards."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from sfa_dist.boundary.plain import for_terminal
from sfa_dist.data.packing.annotations import FORMATS
from sfa_dist.data.packing.pack_settings import DEFAULTS, Encoding, PackSettings, Reading
from sfa_dist.errors import DataError, PreemptedError, UsageError
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.blocks import DataBlock
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, load_recipe
from sfa_dist.tools.init import recipe_lines

_EPILOG = """\
examples:
  sfa pack videos/ shards/                                    one sub-folder of videos/ for each class
  sfa pack list.csv shards/ --videos /data/videos --workers 16     csv with the header path,label (or path,verb,noun)
  sfa pack list.csv shards/ --split-column split --split train --classes classes.txt
  sfa pack list.csv shards/ --short-side 256 --gop 12         re-encode: smaller, and faster to decode
  sfa pack list.csv shards/ --check                           only report on the clips, class by class

official lists, detected by their form (or given by --format):
  sfa pack kinetics400/val.csv shards/ --videos kinetics400/val --prefix val
  sfa pack moments/trainingSet.csv shards/ --videos moments --classes moments/moments_categories.txt
  sfa pack something-something-v2-train.json shards/ --videos ssv2/videos --classes something-something-v2-labels.json
  sfa pack something-else/compositional/train.json shards/ --videos ssv2/videos --classes .../labels.json
  sfa pack EPIC_100_train.csv shards/ --videos EPIC-KITCHENS --short-side 256
  sfa pack ucfTrainTestlist/trainlist01.txt shards/ --videos UCF-101 --prefix train
  sfa pack testTrainMulti_7030_splits shards/ --videos hmdb51 --split-column split1 --split train
  sfa pack activity_net.v1-3.min.json shards/ --videos activitynet --split training --short-side 256
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "pack",
        help="pack videos and labels into indexed shards",
        description="Checks videos, packs the good ones into WebDataset shards, and reports the missing, corrupt, "
        "short and duplicate ones. Of files with the same content only the first is packed, and none where their "
        "labels differ. Whatever is left out or guessed is printed to stderr. An interrupted pack goes on where it "
        "stopped when the same command is run again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, help="a table with the columns path and label, an official list, or a folder of folders")
    add("out_dir", type=Path, help="folder for the shards")
    add("--format", choices=FORMATS, default=DEFAULTS.format, help="format of the source (default: detected)")
    add("--videos", "--root", type=Path, help="folder that holds the videos (default for a table: the table's)")
    forms = "one name a line, the data set's own list, or another pack's manifest.json"
    add("--classes", type=Path, help=f"class list: {forms} (default: sorted labels)")
    add("--split-column", help="column that names a row's split (default: split)")
    add("--split", help="pack only the rows of this split")
    add("--prefix", help="shards are named <prefix>-000000.tar ... (default: the split, or 'shard')")
    add(
        "--shard-size",
        type=_positive,
        default=DEFAULTS.shard_size,
        help="most clips in a shard (default: %(default)s)",
    )
    add("--shard-bytes", type=_positive, help="most bytes of clips in a shard (default: no limit)")
    add(
        "--min-frames",
        type=_positive,
        default=DEFAULTS.min_frames,
        help="leave out clips with fewer frames (default: %(default)s)",
    )
    add(
        "--max-bad-fraction",
        type=_fraction,
        default=DEFAULTS.max_bad_fraction,
        help="pack nothing and exit with 65 if more clips than this fraction are bad (default: %(default)s)",
    )
    add("--seed", type=int, default=DEFAULTS.seed, help="seed of the order in the shards (default: %(default)s)")
    add(
        "--workers",
        type=_count,
        default=DEFAULTS.workers,
        help="processes that check the files (default: this process alone)",
    )
    add("--recipe", type=Path, help="check clips as runs of this recipe read them, and report how they fit it")
    add("--decoder", choices=("auto", "torchcodec", "pyav"), help="(default: the recipe's, else auto)")
    add("--decode-all", action="store_true", help="decode every frame, to find hidden damage too")
    add("--short-side", type=_positive, help="re-encode videos, with a short side of at most this many pixels")
    add(
        "--gop",
        type=_positive,
        help=f"re-encode videos, with this many frames from one key frame to the next (default then: {Encoding.gop})",
    )
    quality = f"quality of re-encoded videos, lower is better (default: {Encoding.crf})"
    add("--crf", type=int, choices=range(52), metavar="0..51", help=quality)
    add("--overwrite", action="store_true", help="replace shards of the same prefix")
    add("--check", action="store_true", help="report on the clips, class by class, and write nothing")
    add("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Packs, and prints the report. Raises DataError (exit code 65), and PreemptedError (75) for Ctrl-C."""
    # Imports torch, for which --help should not wait.
    from sfa_dist.data.packing.pack import pack, report_name

    def say(line: str) -> None:
        print(for_terminal(f"note: {line}"), file=sys.stderr, flush=True)

    recipe = load_recipe(arguments.recipe, environ=environment()).recipe if arguments.recipe else None
    settings = settings_of(arguments, recipe)
    try:
        with _progress() as progress:
            report = pack(arguments.source, arguments.out_dir, settings, progress=progress, say=say)
    except KeyboardInterrupt:
        if arguments.check:
            raise
        advice = "checked and encoded clips are kept, run the same command again to go on"
        raise PreemptedError(f"interrupted; {advice}") from None
    except DataError as error:
        if error.report and not arguments.json:
            kept = None if arguments.check else arguments.out_dir / report_name(error.report["prefix"])
            print(summary(error.report, arguments.out_dir, kept, packed=False))
        raise
    file = None if arguments.check else arguments.out_dir / report_name(report["prefix"])
    if recipe is not None:
        report["recipe"] = recipe_lines(recipe, report["clips"], report["class_counts"].get("label"))
    print(json.dumps(report, indent=1) if arguments.json else summary(report, arguments.out_dir, file))
    return 0


def settings_of(arguments: argparse.Namespace, recipe: Recipe | None) -> PackSettings:
    """The settings that the command line gives. Raises UsageError for a lone --crf."""
    derived: dict[str, Any] = {"readings": _readings(recipe, arguments.decoder), "encoding": _encoding(arguments)}
    given = {each.name: getattr(arguments, each.name) for each in fields(PackSettings) if each.name not in derived}
    return PackSettings(**given, **derived)


def _readings(recipe: Recipe | None, decoder: Literal["auto", "torchcodec", "pyav"] | None) -> tuple[Reading, ...]:
    """How the stages of a recipe read clips; without a recipe, as the schema's defaults do."""
    blocks = [DataBlock()]
    if recipe is not None:
        blocks = [stage.data for name in STAGE_NAMES if (stage := getattr(recipe, name)) is not None]
    return tuple(dict.fromkeys(Reading(decoder or data.decoder, data.fps, data.limits) for data in blocks))


def _encoding(arguments: argparse.Namespace) -> Encoding | None:
    """How videos are re-encoded; None where no option asks for it. Raises UsageError for a lone --crf."""
    values = ((each.name, getattr(arguments, each.name)) for each in fields(Encoding))
    given = {name: value for name, value in values if value is not None}
    if given.keys() == {"crf"}:
        raise UsageError("--crf is of no use without --short-side or --gop: videos are packed as they are")
    return Encoding(**given) if given else None


def summary(report: Mapping[str, Any], out_dir: Path, file: Path | None, packed: bool = True) -> str:
    """The report as text: counts, the first few clips of each problem, and the classes that lack the most clips.

    `file` holds the report (None: the clips are only checked); `packed` is False where too many clips are bad.
    """
    done = f"packed into {out_dir}" if file and packed else "can be packed"
    lines = [f"{report['packed']} of {report['listed']} clips {done} (read as: {report['format']})"]
    for problem in ("missing", "corrupt", "short", "contradictory", "duplicate"):
        entries = report[problem]
        if entries:
            some = "; ".join(f"{each['path']} ({each.get('reason') or each['same_as']})" for each in entries[:3])
            lines.append(f"  {len(entries)} {problem}: {some}{' ...' if len(entries) > 3 else ''}")
    for head, classes in report["classes"].items():
        lines += _class_lines(head, classes)
    if len(lines) > 1:
        lines.append(f"all of them: {file}" if file else "all of them: --json")
    if report["clips"]["frames"]:
        lines += _fact_lines(report["clips"])
    lines += [f"  {line}" for line in report.get("recipe", ())]
    if file and packed and "recipe" not in report:
        lines.append(f"write a recipe that fits: sfa init mine.yaml --shards {shlex.quote(str(out_dir))}")
    return "\n".join(for_terminal(line, lines=False) for line in lines)


def _fact_lines(clips: Mapping[str, Any]) -> list[str]:
    frames = clips["frames"]
    lines = [
        f"  frames: median {frames['median']} ({frames['min']} to {frames['max']}), {clips['fps']:g} a second (median)"
    ]
    if clips["mean"]:
        mean, std = (", ".join(f"{value:.3f}" for value in clips[name]) for name in ("mean", "std"))
        lines.append(f"  pixels: data.mean [{mean}], data.std [{std}]")
    return lines


def _class_lines(head: str, classes: dict[str, dict[str, int]]) -> list[str]:
    empty = [name for name, counts in classes.items() if not counts.get("packed")]
    lacking = sorted(classes.items(), key=lambda item: item[1].get("packed", 0) - item[1]["listed"])
    worst = [f"{name} ({c.get('packed', 0)} of {c['listed']})" for name, c in lacking if c["listed"]][:5]
    lines = []
    if worst:
        lines.append(f"  {head}: classes that lack the most: {', '.join(worst)}")
    if empty:
        few = f"{', '.join(empty[:5])}{' ...' if empty[5:] else ''}"
        lines.append(f"  {head}: classes without any clip: {len(empty)} ({few})")
    return lines


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; a line now and then where stderr is not one."""
    from rich.console import Console
    from rich.progress import Progress

    if not sys.stderr.isatty():
        yield line_now_and_then()
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking clips", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def line_now_and_then(every: float = 10.0, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Prints progress to stderr, at most one line in `every` seconds."""
    last = clock()

    def report(done: int, total: int) -> None:
        nonlocal last
        if clock() - last >= every:
            last = clock()
            print(f"{done} of {total} clips are checked", file=sys.stderr, flush=True)

    return report


def _positive(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value
