"""An experiment's results as a table beside the paper's numbers, and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfa_dist.boundary.disk import read_object, write_json, write_whole
from sfa_dist.run.report.curves import SECONDS, STEP, stage_logs
from sfa_dist.run.report.document import Items, Page, Plot, Section, Series, Table
from sfa_dist.run.report.png import draw_png
from sfa_dist.run.report.run_files import read_run
from sfa_dist.run.report.to_markdown import markdown_page
from sfa_dist.tools.experiments.results import Found
from sfa_dist.tools.experiments.rows import FEW, Experiment

HEADS = ("row", "top-1", "95 %", "top-5", "cost", "all counted", "seconds", "seeds")
PAPER_HEADS = ("paper: top-1", "top-5", "cost")
NONE = "-"
COSTS = (
    "cost: seconds of training over the baseline's, as the paper counts, and of the feature cache where there is one; "
    "all counted: with the image stage and the test in both"
)


def results_page(record: Mapping[str, Any]) -> Page:
    """The page of a record (`results.record_of`)."""
    trained = [row for row in record["rows"] if row["seeds"]]
    left_out = [f"{row['row']}: not trained, {row['left_out']}" for row in record["rows"] if row.get("left_out")]
    missing = [row["row"] for row in record["rows"] if not row["seeds"] and not row.get("left_out")]
    notes = [COSTS, *left_out]
    if trained:
        notes.insert(0, f"guessing scores {trained[0]['chance_acc1']:.2%}")
        notes.insert(1, f"the interval is {_interval_words({row['interval_over'] for row in trained})}")
    if len(ranks := {rank for row in trained for rank in row["ranks"]}) > 1:
        notes.append(f"no cost where rows were trained on different numbers of ranks ({sorted(ranks)})")
    notes += [
        f"{row['row']}: {row['acc1_shuffled_mean']:.2%} with the frames of each clip in random order"
        for row in trained
        if row["acc1_shuffled_mean"] is not None
    ]
    notes += [
        f"{row['row']}: best score after {row['best_step']:,.0f} steps (the paper: {row['paper']['steps']:,})"
        for row in trained
        if row["paper"]["steps"] and row["best_step"] is not None
    ]
    if missing:
        notes.append(f"not yet there: {', '.join(missing)}")
    notes.append(f"{record['date']}, {record['machine']}, sfa_dist {record['sfa_dist']}: {record['command']}")
    heads = [*HEADS, *PAPER_HEADS]
    table = Table(f"{record['title']}, at the scale {record['scale']}", heads, [_cells(row) for row in record["rows"]])
    return Page(record["title"], f"The paper has {record['paper']}.", [Section("Results", [table, Items(notes)])])


def _interval_words(over: set[str]) -> str:
    words = {"clips": "over the clips where there is one seed", "seeds": "of the mean where there are more"}
    if len(over) > 1:
        return f"{words['clips']}, and {words['seeds']}"
    return "over the clips of one seed" if over == {"clips"} else "of the mean over seeds"


def _cells(row: Mapping[str, Any]) -> list[str]:
    paper = row["paper"]
    printed = [_number(paper["acc1"], "{:.2f}"), _number(paper["acc5"], "{:.2f}"), _number(paper["cost"], "{:.2f}x")]
    name = f"{row['row']} ({row['words']})"
    if not row["seeds"]:
        return [name, *[NONE] * (len(HEADS) - 1), *printed]
    spread = "" if row["acc1_sd"] is None else f" ± {row['acc1_sd'] * 100:.2f}"
    low, high = row["acc1_interval"]
    return [
        name,
        f"{row['acc1_mean'] * 100:.2f}{spread}",
        f"{low * 100:.1f} to {high * 100:.1f}",
        f"{row['acc5_mean'] * 100:.2f}",
        _number(row["cost_ratio"], "{:.2f}x"),
        _number(row["cost_ratio_everything"], "{:.2f}x"),
        f"{row['seconds']:.0f}",
        str(len(row["seeds"])),
        *printed,
    ]


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def print_results(record: Mapping[str, Any]) -> None:
    """Prints the table and its notes to stdout."""
    from rich.console import Console
    from rich.table import Table as RichTable

    page = results_page(record)
    console = Console(width=150)
    for block in page.sections[0].blocks:
        if isinstance(block, Table):
            shown = RichTable(title=block.title, header_style="", box=None, pad_edge=False)
            for number, head in enumerate(block.heads):
                shown.add_column(head, justify="left" if number == 0 else "right")
            for row in block.rows:
                shown.add_row(*row)
            console.print(shown, highlight=False, markup=False)
        elif isinstance(block, Items):
            for line in block.lines:
                console.print(line, highlight=False, markup=False, soft_wrap=True)


def keep_earlier(experiment: Experiment, scale: str, found: Mapping[str, Sequence[Found]], out: Path) -> Path | None:
    """Moves earlier results in `out` aside that have more than is `found` now, or are of another scale.

    So nothing that was found once is written over. Returns the folder they are in now, None where none has to be moved.
    Raises OSError.
    """
    file = out / f"{experiment.name}.json"
    try:
        earlier = read_object(file, scale=str, rows=list)
        had = {
            (row["row"], seed, acc1)
            for row in earlier["rows"]
            for seed, acc1 in zip(row["seeds"], row.get("acc1", ()), strict=True)
        }
        now = {(row, each.seed, each.acc1) for row, own in found.items() for each in own}
        if earlier["scale"] == scale and had <= now:
            return None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass  # It is something else: that is kept too.
    folders = (out / f"earlier-{number}" for number in itertools.count(1))
    folder = next(folder for folder in folders if not (folder / file.name).exists())
    folder.mkdir(exist_ok=True)
    for path in (file.with_suffix(suffix) for suffix in (".md", ".png", ".json")):
        if path.exists():
            path.rename(folder / path.name)
    return folder


def write_results(record: Mapping[str, Any], experiment: Experiment, out: Path) -> list[Path]:
    """Writes <name>.json, <name>.md and, where there is something to draw, <name>.png into `out`. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / experiment.name
    written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    write_json(written[0], record)
    text = markdown_page(results_page(record))
    if plots := plots_of(record, experiment):
        written.append(draw_png(plots, stem.with_suffix(".png")))
        text += f"\n![{experiment.title}]({experiment.name}.png)\n"
    write_whole(written[1], text.encode())
    return written


def plots_of(record: Mapping[str, Any], experiment: Experiment) -> list[Plot]:
    """What the picture shows: accuracy against cost, and for figures 3 and 4 what these show."""
    trained = [row for row in record["rows"] if row["seeds"]]
    if not trained:
        return []
    if experiment.name == "fig3":
        return [_by_stage1(trained, experiment)]
    if experiment.name == "fig4":
        return _over_time(trained)
    return [_against_cost(trained)]


def _against_cost(rows: Sequence[Mapping[str, Any]]) -> Plot:
    points = [Series(row["row"], [(row["seconds"], row["acc1_mean"])]) for row in rows]
    guessing = rows[0]["chance_acc1"]
    last = max(row["seconds"] for row in rows)
    chance = Series("guessing", [(0.0, guessing), (last, guessing)])
    return Plot("Top-1 against cost", "seconds of training", [*points, chance], 1.0)


def _by_stage1(rows: Sequence[Mapping[str, Any]], experiment: Experiment) -> Plot:
    """A curve for each number of frames of stage 2; 0 frames of stage 1 are the image checkpoint."""
    scores = {row["row"]: row["acc1_mean"] for row in rows}
    curves: dict[int, list[tuple[float, float | None]]] = {}
    for row in experiment.rows:
        if row.name in scores and row.training is not None:
            few = 0 if row.training.sets else row.training.few
            curves.setdefault(row.training.frames, []).append((few, scores[row.name]))
    series = [Series(f"{frames} frames in stage 2", points) for frames, points in curves.items()]
    return Plot(f"Top-1 by the paper's frames of stage 1 (it takes {FEW})", "frames of stage 1", series, 1.0)


def _over_time(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Validation accuracy of each row's first seed over the steps and the seconds of its last stage."""
    logs = {row["row"]: list(stage_logs(read_run(Path(row["runs"][0]))).values()) for row in rows}
    plots = []
    for over, word in ((STEP, "steps"), (SECONDS, "seconds")):
        series = [
            Series(name, own[-1].points(own[-1].evaluations, lambda line: line.get("acc1"), over))
            for name, own in logs.items()
            if own and own[-1].evaluations
        ]
        plots.append(Plot(f"Validation top-1 over {word} of the last stage", over, series, 1.0))
    return plots
