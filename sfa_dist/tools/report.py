"""`sfa report`: one HTML page and its Markdown of a finished or running run, or of several beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sfa_dist.boundary.file_names import LOG
from sfa_dist.errors import UsageError

COMPARISON = "comparison.html"


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "report",
        help="write report.html and report.md of a run, or one page that compares several",
        description="Writes report.html, report.md and figures/ into each run directory. With --compare it writes one\n"
        "page of all runs instead, which compares the others with the first.",
        epilog="examples:\n  sfa report runs/demo\n  sfa report runs/baseline runs/mine --compare --out mine.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directories, e.g. runs/h_96f")
    parser.add_argument("--compare", action="store_true", help="one page of all of them, the first is the baseline")
    parser.add_argument(
        "--out", type=Path, help="where --compare writes its page (default: comparison.html; Markdown beside it)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the pages and says where they are. Raises UsageError, CheckpointError, OSError."""
    from sfa_dist.run.report.compare import write_comparison
    from sfa_dist.run.report.page import write_report

    run_dirs: list[Path] = arguments.run_dir
    for run_dir in run_dirs:
        if not (run_dir / LOG).is_file():
            raise UsageError(f"{run_dir} is not a run directory (it has no log.jsonl)")
    if not arguments.compare:
        if arguments.out is not None:
            raise UsageError("--out is for --compare: the report of a run lies in its directory")
        for run_dir in run_dirs:
            print(write_report(run_dir))
        return 0
    if len({run_dir.resolve() for run_dir in run_dirs}) < max(2, len(run_dirs)):
        raise UsageError("--compare needs at least two runs, each named once")
    out = arguments.out or Path(COMPARISON)
    if out.suffix != ".html":
        raise UsageError(f"--out {out}: a name that ends with .html (the Markdown has the same with .md)")
    print(write_comparison(run_dirs, out))
    return 0
