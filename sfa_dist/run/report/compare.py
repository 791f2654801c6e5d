"""One page of several runs: their scores, costs and curves beside each other, the first one being what the others are
compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import write_whole
from sfa_dist.boundary.secret import without_secrets_in
from sfa_dist.errors import CheckpointError
from sfa_dist.run.cost import cost_words
from sfa_dist.run.record import flatten
from sfa_dist.run.report.curves import SECONDS, STEP, StageLog, stage_logs
from sfa_dist.run.report.document import Block, Items, Page, Picture, Plot, Plots, Section, Series, Table, Text
from sfa_dist.run.report.paired import Paired, pair_runs
from sfa_dist.run.report.paper_row import paper_blocks
from sfa_dist.run.report.png import draw_png, file_word
from sfa_dist.run.report.run_files import RunFiles, read_run
from sfa_dist.run.report.seeds import seed_blocks
from sfa_dist.run.report.to_html import html_page
from sfa_dist.run.report.to_markdown import markdown_page
from sfa_dist.run.report.verdict import interval_of, interval_words

MOST_PAIRED = 5  # Runs of which each pair is tested; of more, each against the first.
NAMELESS = ("name", "seed", "log")  # Keys of a recipe that are no setting of what is compared.
AXES = {STEP: "steps", SECONDS: "seconds"}
PICTURE_COLUMNS = 2
KINDS = {"Training loss": ("loss", None), "Validation top-1": ("acc1", 1.0)}

Named = dict[str, RunFiles]


def write_comparison(run_dirs: Sequence[Path], page_file: Path) -> Path:
    """Writes the page and, beside it, its Markdown with a picture of each stage's curves; returns the page. Raises
    CheckpointError where a file of a run is not what this program writes, OSError."""
    try:
        page = comparison_page(_named(run_dirs), page_file)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"a file of {', '.join(map(str, run_dirs))} is not what this program writes ({why}): `sfa report` of each "
            "run alone names it"
        ) from error
    write_whole(page_file.with_suffix(".md"), markdown_page(page).encode())
    write_whole(page_file, html_page(page).encode())
    return page_file


def _named(run_dirs: Sequence[Path]) -> Named:
    """By the directory's name, by the whole path where two have the same."""
    names = [directory.resolve().name for directory in run_dirs]
    return {
        name if names.count(name) == 1 else str(directory): read_run(directory)
        for name, directory in zip(names, run_dirs, strict=True)
    }


def comparison_page(runs: Named, page_file: Path) -> Page:
    """The page of at least two runs. Writes its pictures. Raises OSError."""
    first, *others = runs
    shown = combinations(runs, 2) if len(runs) <= MOST_PAIRED else ((first, other) for other in others)
    pairs = [pair_runs(one, runs[one], other, runs[other]) for one, other in shown]
    verdict = [line for other in others for line in _verdict(first, other, runs)]
    sections = [
        Section("Verdict", [Items([*verdict, *(pair.words for pair in pairs if pair.names[0] == first)])]),
        Section("Scores and costs", [_scores(runs)]),
        Section("As the paper's tables", paper_blocks(runs)),
        Section("The same clips", [_paired_table(pairs)]),
        Section("Seeds", seed_blocks({name: (run, _settings(run)) for name, run in runs.items()})),
        *_curves(runs, page_file),
        Section("Settings that differ", _differences(runs)),
    ]
    return Page(f"{first} and {', '.join(others)}", f"Compared with {first}, the first of {len(runs)} runs.", sections)


def _verdict(first: str, other: str, runs: Named) -> list[str]:
    base, mine = runs[first].result, runs[other].result
    if not base or not mine:
        lacking = " and ".join(name for name in (first, other) if not runs[name].result)
        return [f"{other} cannot be compared with {first}: no test result of {lacking} yet."]
    points = (mine["acc1"] - base["acc1"]) * 100
    beside = (
        f"{abs(points):.2f} points {'above' if points > 0 else 'below'} {first}" if points else f"that of {first} too"
    )
    text = f"{other}: top-1 {mine['acc1']:.2%}, {beside}"
    if base["total_seconds"]:
        text += f", in {mine['total_seconds'] / base['total_seconds']:.2f} times its seconds of training"
    return [f"{text}."]


def _scores(runs: Named) -> Table:
    base = next(iter(runs.values())).result
    heads = ["run", "top-1", "95 % interval by clips", "difference (points)", "frames shuffled", "clips"]
    heads += ["seconds", "times the first's", "rank-seconds", "cost ratio"]
    return Table("Runs", heads, [[name, *_score_cells(run.result, base)] for name, run in runs.items()])


def _score_cells(result: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if not result:
        return ["no result yet", *[""] * 8]
    shuffled, ratio = result.get("acc1_shuffled_frames"), result.get("cost_ratio")
    seconds = result["total_seconds"]
    stages = result.get("stages", {}).values()
    return [
        f"{result['acc1']:.2%}",
        interval_words(interval_of(result)),
        f"{(result['acc1'] - base['acc1']) * 100:+.2f}" if base else "",
        "not measured" if shuffled is None else f"{shuffled:.2%}",
        f"{result['samples']:,}",
        f"{seconds:,.0f}",
        f"{seconds / base['total_seconds']:.2f}" if base and base["total_seconds"] else "",
        f"{sum(stage.get('gpu_seconds', 0) for stage in stages):,.0f}",
        "not measured" if ratio is None else f"{ratio:.2f} ({cost_words(result)})",
    ]


def _paired_table(pairs: Sequence[Paired]) -> Block:
    heads = ["runs", "clips of both", "only the first right", "only the second right", "p (McNemar, exact)"]
    rows = [
        [" and ".join(pair.names), f"{pair.clips:,}", f"{pair.only_first:,}", f"{pair.only_second:,}", f"{pair.p:.2g}"]
        for pair in pairs
        if pair.p is not None
    ]
    return Table("Paired test on the same clips", heads, rows) if rows else Text("No two runs can be tested in pairs.")


def _curves(runs: Named, page_file: Path) -> list[Section]:
    """A section for each stage, with `<page>_<stage>.png` beside the page for the Markdown."""
    logs = {name: stage_logs(run) for name, run in runs.items()}
    sections = []
    for stage in dict.fromkeys(stage for found in logs.values() for stage in found):
        of_stage = {name: found.get(stage) for name, found in logs.items()}
        plots = [plot for over in AXES for kind in KINDS if (plot := _plot(kind, over, of_stage)) is not None]
        if plots:
            picture = draw_png(plots, page_file.with_name(f"{page_file.stem}_{file_word(stage)}.png"), PICTURE_COLUMNS)
            sections.append(Section(f"Curves of {stage}", [Plots(plots), Picture(Path(picture.name))]))
    return sections


def _plot(kind: str, over: str, logs: dict[str, StageLog | None]) -> Plot | None:
    """One kind of curve of all runs; None where none has it. Every run keeps its position, and so its colour."""
    key, top = KINDS[kind]
    series = []
    for name, log in logs.items():
        rows = [] if log is None else log.train if key == "loss" else log.evaluations
        points = [] if log is None else log.points(rows, lambda row: row.get(key), over)
        series.append(Series(name, points))
    has_numbers = any(y is not None for each in series for _, y in each.points)
    return Plot(f"{kind} over {AXES[over]}", over, series, top, over == STEP) if has_numbers else None


def _settings(run: RunFiles) -> dict[str, Any] | None:
    """What the recipe says, flat, without names and seeds; None where it is not known."""
    if run.recipe is None:
        return None
    whole = {key: value for key, value in run.recipe.model_dump(mode="json").items() if key not in NAMELESS}
    flat: dict[str, Any] = flatten(without_secrets_in(whole))
    return flat


def _differences(runs: Named) -> list[Block]:
    known = {name: settings for name, run in runs.items() if (settings := _settings(run)) is not None}
    lacking = [name for name in runs if name not in known]
    blocks: list[Block] = [Text(f"Without a recipe that this version reads: {', '.join(lacking)}.")] if lacking else []
    if len(known) < 2:
        return blocks
    keys = list(dict.fromkeys(key for settings in known.values() for key in settings))
    values = {key: [str(settings.get(key, "not there")) for settings in known.values()] for key in keys}
    rows = [[key, *found] for key, found in values.items() if len(set(found)) > 1]
    if not rows:
        return [*blocks, Text("Apart from names and seeds their recipes do not differ.")]
    return [*blocks, Table("Keys of the recipes", ["key", *known], rows, long=True)]
