"""`sfa predict`: prints the likeliest classes of a video file, or of each moment of a long video."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_EPILOG = """\
examples:
  sfa predict clip.mp4 --run runs/b_32f
  sfa predict a.mp4 b.mkv --json --recipe mine.yaml --weights tail.safetensors --trunk-weights stage1.safetensors
  sfa predict match.mp4 --run runs/b_32f --timeline --hop 0.5 --out timelines
  sfa predict /dev/video0 --run runs/b_32f --timeline        a camera; Ctrl-C ends it
  ssh store cat long.mkv | sfa predict - --run runs/b_32f --timeline

exit codes: 0 done; 64 wrong command line, or a missing video; 65 a file does not decode (the others are predicted);
74 missing weights; 78 recipe and weights disagree
What the numbers mean: docs/predict.md
"""


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "predict",
        help="print the top-5 classes of a video file, or a timeline of a long one",
        description="Prints the likeliest classes of each video, averaged over the recipe's test views. With "
        "--timeline it prints those of each moment of a long video, a camera or a stream, and writes a JSON file and "
        "a figure.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a file; with --timeline also a device, URL or -")
    parser.add_argument("--run", dest="run_dir", type=Path, help="a run directory with final weights")
    parser.add_argument("--recipe", type=Path, help="with --weights, in place of --run: the recipe of the weights")
    parser.add_argument("--weights", type=Path, help="the final weights of a stage")
    parser.add_argument("--trunk-weights", type=Path, help="stage 1's weights, if --weights are of stage 2")
    parser.add_argument(
        "--stage", choices=("stage1", "stage2"), help="default: the run's last, or the one the weights name"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to print (default: 5)")
    parser.add_argument("--timeline", action="store_true", help="slide a window over the video")
    parser.add_argument(
        "--hop", type=float, metavar="SECONDS", help="time between windows (default: a quarter of a window)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="the folder for a timeline's JSON and figure, which is made if needed (default: the current folder)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Predicts and prints. Raises SfaError, with the exit codes of the contract."""
    from sfa_dist.tools.predict_videos import predict_videos  # Imported here: it loads torch.

    return predict_videos(arguments)
