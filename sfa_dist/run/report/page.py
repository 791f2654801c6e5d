"""report.html and report.md of one run: what was trained, what came out, how it went. Reads the run directory, and the
test's shards for some pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sfa_dist.boundary.disk import write_whole
from sfa_dist.boundary.file_names import REPORT_PAGE, REPORT_TEXT
from sfa_dist.errors import CheckpointError
from sfa_dist.run.report.classes import class_blocks, draw_confusions
from sfa_dist.run.report.clips import clip_section
from sfa_dist.run.report.curves import curve_sections, pictures_of
from sfa_dist.run.report.document import Items, Page, Picture, Section
from sfa_dist.run.report.facts import run_sections
from sfa_dist.run.report.paper_row import paper_blocks
from sfa_dist.run.report.png import draw_png
from sfa_dist.run.report.run_files import RunFiles, read_run
from sfa_dist.run.report.scores import sweep_tables, views_tables
from sfa_dist.run.report.to_html import html_page
from sfa_dist.run.report.to_markdown import markdown_page
from sfa_dist.run.report.verdict import headline, verdict_lines

FIGURES = "figures"


def write_report(run_dir: Path, stopped: Callable[[], bool] = bool) -> Path:
    """Writes report.html, report.md and figures/*.png from the files of a run; returns the page.

    Once `stopped` says so, clips that have no picture yet go without. Raises CheckpointError where a file is not what
    this program writes, OSError.
    """
    try:
        page = run_page(read_run(run_dir), stopped)
        write_whole(run_dir / REPORT_TEXT, markdown_page(page).encode())
        write_whole(run_dir / REPORT_PAGE, html_page(page).encode())
        return run_dir / REPORT_PAGE
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{run_dir}: log.jsonl, result.json, env.json or test/classes.json is not what this program writes ({why})"
        ) from error


def run_page(run: RunFiles, stopped: Callable[[], bool] = bool) -> Page:
    """The report of a run. Writes its figures. Raises OSError."""
    setup, stages, happened = run_sections(run)
    scores = [*views_tables(run.result), *sweep_tables(run.result)]
    sections = [
        Section("Verdict", [Items(verdict_lines(run))]),
        Section("Scores", scores),
        Section("As the paper's tables", paper_blocks({run.name: run})),
        Section("Classes", class_blocks(run.classes)),
        *([clip_section(run, stopped)] if run.result else []),
        *curve_sections(run),
        stages,
        setup,
        happened,
        Section("Figures", _pictures(run)),
    ]
    shown = [section for section in sections if section.blocks]
    return Page(run.name, headline(run.result), shown)


def _pictures(run: RunFiles) -> list[Picture]:
    folder = run.directory / FIGURES
    folder.mkdir(exist_ok=True)
    drawn = [draw_png(plots, folder / f"{name}.png") for name, plots in pictures_of(run).items()]
    figures = (*drawn, *draw_confusions(run.classes, folder))
    return [Picture(path.relative_to(run.directory)) for path in figures]
