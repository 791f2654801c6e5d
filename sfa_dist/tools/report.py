"""`sfa report`: one HTML page and its Markdown of a finished or running run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sfa_dist.boundary.file_names import LOG
from sfa_dist.errors import UsageError
from sfa_dist.run.report.page import write_report


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "report",
        help="write report.html and report.md of a run",
        description="Writes report.html, report.md and figures/ into a run directory.",
        epilog="example: sfa report runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, help="a run directory, e.g. runs/h_96f")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the report and says where it is."""
    if not (arguments.run_dir / LOG).is_file():
        raise UsageError(f"{arguments.run_dir} is no run directory (it has no log.jsonl)")
    print(write_report(arguments.run_dir))
    return 0
