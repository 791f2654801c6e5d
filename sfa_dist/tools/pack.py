"""`sfa pack`: videos and labels into indexed shards."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfa_dist.errors import UsageError

if TYPE_CHECKING:
    from sfa_dist.data.reencode import Encoding

_EPILOG = """\
examples:
  sfa pack videos/ shards/                                    one sub-folder of videos/ for each class
  sfa pack list.csv shards/ --root /data/videos --workers 16  csv with the header path,label
  sfa pack list.csv shards/ --split-column split --split train --classes classes.txt
  sfa pack list.csv shards/ --short-side 256 --gop 12         encode anew: smaller, and quicker to decode
"""

_OPTIONS = (
    *("root", "classes", "split_column", "split", "prefix", "shard_size", "shard_bytes", "min_frames"),
    *("max_bad_fraction", "seed", "workers", "decoder", "decode_all", "overwrite"),
)


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "pack",
        help="pack videos and labels into indexed shards",
        description="Checks videos, packs the good ones into WebDataset shards, and reports the missing, corrupt, "
        "short and duplicate ones. Of files with the same content only the first is packed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="a csv with the columns path and label, or a folder with one sub-folder a class",
    )
    add("out_dir", type=Path, help="where the shards go")
    add("--root", type=Path, help="folder that relative paths of the csv start from (default: the csv's)")
    add("--classes", type=Path, help="class names, one a line, in label order (default: the sorted labels)")
    add("--split-column", help="column that says which split a row is of (default: split)")
    add("--split", help="pack only the rows of this split")
    add("--prefix", help="shards are <prefix>-000000.tar ... (default: the split, or 'shard')")
    add("--shard-size", type=_positive, default=1000, help="clips in a shard at most (default: %(default)s)")
    add("--shard-bytes", type=_positive, help="bytes of clips in a shard at most")
    add("--min-frames", type=_positive, default=1, help="shorter clips are left out (default: %(default)s)")
    add("--max-bad-fraction", type=_fraction, default=0.05, help="more bad clips end with exit code 65 (default: 0.05)")
    add("--seed", type=int, default=0, help="of the order in the shards (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that check the files (default: this one alone)")
    add("--decoder", choices=("auto", "torchcodec", "pyav"), default="auto", help="(default: %(default)s)")
    add("--decode-all", action="store_true", help="decode every frame, not only the first, middle and last")
    add("--short-side", type=_positive, help="encode videos anew, with a short side of at most so many pixels")
    add(
        "--gop",
        type=_positive,
        help="encode videos anew, with a key frame every so many frames (with --short-side: 12)",
    )
    add(
        "--crf",
        type=int,
        choices=range(52),
        metavar="0..51",
        help="quality where videos are encoded anew (default: 23)",
    )
    add("--overwrite", action="store_true", help="replace shards of the same prefix")
    add("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Packs and says what was left out. Raises DataError, which ends with exit code 65."""
    from sfa_dist.data.pack import pack  # Brings torch, which the other commands' --help need not wait for.

    options = {name: getattr(arguments, name) for name in _OPTIONS} | {"encoding": _encoding(arguments)}
    report = pack(arguments.source, arguments.out_dir, progress=_show if sys.stderr.isatty() else None, **options)
    print(json.dumps(report, indent=1) if arguments.json else summary(report, arguments.out_dir))
    return 0


def _encoding(arguments: argparse.Namespace) -> Encoding | None:
    """How videos are encoded anew, None where none of the options asks for it. Raises UsageError for a lone --crf."""
    from sfa_dist.data.reencode import Encoding

    given = {name: getattr(arguments, name) for name in ("short_side", "gop", "crf")}
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() == {"crf"}:
        raise UsageError("--crf is of no use without --short-side or --gop: videos are packed as they are")
    return Encoding(**given) if given else None


def summary(report: dict[str, Any], out_dir: Path) -> str:
    """The report for a person: counts, and the first few clips of each problem."""
    lines = [f"packed {report['packed']} of {report['listed']} clips into {out_dir}"]
    for problem in ("missing", "corrupt", "short", "duplicate"):
        entries = report[problem]
        if entries:
            some = "; ".join(f"{each['path']} ({each.get('reason') or each['same_as']})" for each in entries[:3])
            lines.append(f"  {len(entries)} {problem}: {some}{' ...' if len(entries) > 3 else ''}")
    if len(lines) > 1:
        lines.append(f"all of them: {out_dir / 'report.json'}")
    return "\n".join(lines)


def _show(done: int, total: int) -> None:
    print(f"\rchecked {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value
