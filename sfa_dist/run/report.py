"""The report of a run: what was trained, the results and how it went. It reads the run directory only."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sfa_dist.boundary.counted import counted
from sfa_dist.boundary.disk import parse_object, read_object, read_plain, write_whole
from sfa_dist.boundary.file_names import ENVIRONMENT, LOG, RECIPE, REPORT_PAGE, REPORT_TEXT, RESULT
from sfa_dist.boundary.plain import for_figure, for_html, for_markdown
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.errors import CheckpointError
from sfa_dist.recipe.stage_names import TEST
from sfa_dist.run.chance import chance_words, heads_of, shows_top5, verdicts
from sfa_dist.run.report_classes import Table, class_reports, draw_confusions, read_class_tables

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid
#d0d7de; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
vertical-align: top; }
table { display: block; overflow-x: auto; }
th { font-weight: 600; border-bottom: 1px solid #d0d7de; } td.number, th.number { text-align: right;
font-variant-numeric: tabular-nums; }
.headline { font-size: 1.1rem; } img { max-width: 100%; } pre { background: #f6f8fa; padding: .8rem; overflow-x:
auto; font-size: 13px; }
.muted { color: #59636e; } .facts td + td { overflow-wrap: anywhere; }
"""
STAGE_COLUMNS = (
    ("steps", "steps", "{:,}"),
    ("seconds", "seconds", "{:,.0f}"),
    ("gpu_seconds", "rank-seconds", "{:,.0f}"),
    ("peak_memory_gib", "peak memory (GiB)", "{:.2f}"),
    ("trainable_parameters", "trainable", "{:,}"),
    ("frozen_parameters", "frozen", "{:,}"),
    ("optimizer_bytes_per_rank", "optimizer bytes per rank", "{:,}"),
    ("bad_samples", "bad clips", "{:,}"),
)
SCORES = {"acc1": "top-1", "acc5": "top-5"}
BAD_COLUMNS = ("shard", "key", "reason", "stages")
SHOWN_BAD_CLIPS = 500
MAX_LOG = 2**31  # Bytes.
SHOWN_OF_LONG = 10  # Rows of a long table.


def write_report(run_dir: Path) -> Path:
    """Writes report.html, report.md and figures/*.png, and returns the path of the page.

    They are made from log.jsonl, result.json, env.json, recipe.yaml and test/classes.json. Raises CheckpointError if
    one of these is not what this program writes, OSError if the disk refuses.
    """
    try:
        return _write_report(run_dir)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{run_dir}: log.jsonl, result.json, env.json or test/classes.json is not what this program writes ({why})"
        ) from error


def _write_report(run_dir: Path) -> Path:
    records = read_log(run_dir / LOG)
    result = _read_json(run_dir / RESULT)
    env = _read_json(run_dir / ENVIRONMENT)
    recipe_file = run_dir / RECIPE  # Written before 0.4 it may hold secrets.
    recipe = without_secrets(recipe_file.read_text(errors="replace")) if recipe_file.is_file() else ""
    classes = read_class_tables(run_dir)
    figures = draw_figures(records, run_dir / "figures") + draw_confusions(classes, run_dir / "figures")
    tables = [*views_tables(result), *sweep_tables(result), *class_reports(classes)]
    write_whole(run_dir / REPORT_TEXT, _markdown(run_dir.name, records, result, env, figures, tables).encode())
    page = run_dir / REPORT_PAGE
    write_whole(page, _html(run_dir.name, records, result, env, figures, tables, recipe).encode())
    return page


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl. Lines that are not records are skipped: a killed run may leave a cut last line."""
    records = []
    try:
        for line in read_plain(path, MAX_LOG).splitlines():
            try:
                records.append(parse_object(line, kind=str))
            except ValueError:
                continue
    except FileNotFoundError:
        pass
    return records


def latest_by_step(records: list[dict[str, Any]], kind: str) -> dict[str, list[dict[str, Any]]]:
    """The records of a kind by stage, in order of steps. Of a step that was repeated after a resume the last counts."""
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record.get("kind") == kind and not record.keys() & {"frame_order", "member"}:
            stages.setdefault(record["stage"], {})[record["step"]] = record
    return {stage: [by_step[step] for step in sorted(by_step)] for stage, by_step in stages.items()}


def draw_figures(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws loss and validation accuracy over the steps of each stage; returns the paths of the figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    folder.mkdir(exist_ok=True)
    figures = []
    wanted = (("train", "loss", "training loss"), ("eval", "acc1", "validation top-1"))
    for kind, key, label in wanted:
        stages = {name: rows for name, rows in latest_by_step(records, kind).items() if name != TEST}
        if not stages:
            continue
        figure, axes = pyplot.subplots(1, len(stages), figsize=(4.2 * len(stages), 3), squeeze=False)
        for axis, (name, rows) in zip(axes[0], stages.items(), strict=True):
            points = [(row["step"], row[key]) for row in rows if isinstance(row[key], int | float)]
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 40 else None, markersize=3, linewidth=1.4)
            axis.set(title=for_figure(name), xlabel="optimizer step", ylabel=label)
            if len(points) == 1:
                axis.set_xlim(points[0][0] - 1, points[0][0] + 1)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axis.grid(alpha=0.3)
            if key == "acc1":
                axis.set_ylim(0, 1)
        figure.tight_layout()
        path = folder / f"{kind}_{key}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        figures.append(path)
    return figures


def bad_clips(records: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(shard, key, reason, stages) of each bad clip, once, in order of shard and key."""
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for record in records:
        if record.get("kind") == "event" and record.get("event") == "bad_sample":
            shard, _, key = record["key"].partition("/")
            _, stages = found.setdefault((shard, key), ("", []))
            stages += [record["stage"]] if record["stage"] not in stages else []
            found[shard, key] = (record["reason"], stages)
    return [(shard, key, reason, ", ".join(stages)) for (shard, key), (reason, stages) in sorted(found.items())]


def _headline(result: dict[str, Any]) -> str:
    if not result:
        return "No test result yet."
    scores = f"top-1 {result['acc1']:.2%}" + (f", top-5 {result['acc5']:.2%}" if shows_top5(result) else "")
    text = f"{scores} on {result['samples']:,} clips ({counted(result['views'], 'view')})"
    if "acc1_shuffled_frames" in result:
        text += f"; top-1 {result['acc1_shuffled_frames']:.2%} when the frames of each clip are in random order"
    return text + f". Training took {result['total_seconds']:,.0f} s."


def _remarks(result: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """The score of guessing, whether the run's score is better, and the notices about the stages' clips."""
    words = [*chance_words(result), *verdicts(result)]
    return [f"{text[0].upper()}{text[1:]}." for text in words] + notices_of(records)


def notices_of(records: list[dict[str, Any]]) -> list[str]:
    """The texts of all `notice` events, each once."""
    notices = (record for record in records if record.get("kind") == "event" and record.get("event") == "notice")
    return list(dict.fromkeys(f"{notice['stage']}: {notice['text']}" for notice in notices))


def _stage_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, stage in result.get("stages", {}).items():
        rows.append([name, *(form.format(stage[key]) for key, _, form in STAGE_COLUMNS)])
    return rows


def views_tables(result: dict[str, Any]) -> list[Table]:
    """The scores for each number of views tested, by head if there are several."""
    lines = result.get("by_views", [])
    heads = heads_of(lines[0]) if lines else []
    keys = {**SCORES, "mean_class_acc1": "mean over classes"}
    if not any(shows_top5(lines[0], head) for head in heads):
        del keys["acc5"]
    rows = [
        [
            f"{line['temporal_views']} x {line['spatial_views']}",
            *([head.removesuffix("_")] if head else []),
            *(f"{line[f'{head}{key}']:.2%}" for key in keys),
        ]
        for line in lines
        for head in heads
    ]
    titles = ["views (temporal x spatial)", *(["of the"] if any(heads) else []), *keys.values()]
    return [Table("Test", titles, rows)] if rows else []


def sweep_tables(result: dict[str, Any]) -> list[Table]:
    """The members of a sweep, the means over seeds if it varies the seed, and the members that diverged."""
    lines, means = result.get("sweep", []), result.get("sweep_means", [])
    if not lines:
        return []
    keys = list(lines[0]["settings"])
    scores = SCORES if shows_top5(lines[0]) else {"acc1": SCORES["acc1"]}
    members = [
        [
            line["member"] + _remark(line, result),
            *(str(line["settings"][key]) for key in keys),
            f"{line['trainable_parameters']:,}",
            *(f"{line[key]:.2%}" for key in scores),
            f"{line['loss']:.4f}",
        ]
        for line in lines
    ]
    tables = [Table("Sweep", ["member", *keys, "trainable", *scores.values(), "loss"], members)]
    if "seed" in keys:
        keys.remove("seed")
        rows = [[*(str(mean["settings"][key]) for key in keys), *_mean_cells(mean, scores)] for mean in means]
        tables.append(Table("Sweep, mean ± deviation over seeds", [*keys, "seeds", *scores.values(), "loss"], rows))
    if lost := result.get("sweep_diverged"):
        rows = [[line["member"], *(str(value) for value in line["settings"].values()), line["reason"]] for line in lost]
        tables.append(Table("Sweep, members that diverged", ["member", *lines[0]["settings"], "why"], rows))
    return tables


def _remark(line: dict[str, Any], result: dict[str, Any]) -> str:
    """The remark behind a member's name: whether it is the best on validation, and no better than chance.

    Without a validation set no member is the best.
    """
    is_best = line["member"] == result.get("best") and line.get("val_acc1") is not None
    remarks = ["best on validation"] * is_best
    remarks += ["no better than chance"] * (line.get("better_than_chance") is False)
    return f" ({', '.join(remarks)})" if remarks else ""


def _mean_cells(mean: dict[str, Any], scores: Iterable[str]) -> list[str]:
    cells = [str(len(mean["members"]))]
    for key, form in (*((score, "{:.2%}") for score in scores), ("loss", "{:.4f}")):
        deviation = mean[f"{key}_deviation"]
        cells.append(form.format(mean[key]) + ("" if deviation is None else f" ± {form.format(deviation)}"))
    return cells


def _facts(records: list[dict[str, Any]], env: dict[str, Any]) -> list[tuple[str, str]]:
    ranks = env.get("ranks", [])
    devices = sorted({rank["device"] for rank in ranks})
    versions = ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items() if version)
    events = [record for record in records if record.get("kind") == "event"]
    counts = {
        name: sum(e["event"] == name for e in events) for name in ("resume", "preempted", "fallback", "bad_sample")
    }
    return [
        ("commit", str(env.get("commit") or f"version {env.get('sfa_dist')}")),
        ("ranks", f"{len(ranks)} on {counted(len({rank['host'] for rank in ranks}), 'host')}, {', '.join(devices)}"),
        ("launcher, decoder", f"{env.get('launcher')}, {env.get('decoder')}"),
        ("versions", versions),
        ("events", ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"),
    ]


def _markdown(
    name: str,
    records: list[dict[str, Any]],
    result: dict[str, Any],
    env: dict[str, Any],
    figures: list[Path],
    tables: list[Table],
) -> str:
    remarks = (f"- {for_markdown(remark)}" for remark in _remarks(result, records))
    lines = [f"# {for_markdown(name)}", "", _headline(result), "", *remarks, ""]
    if result:
        heads = ["stage", *(title for _, title, _ in STAGE_COLUMNS)]
        lines += [*_markdown_table(heads, _stage_rows(result)), ""]
    for table in tables:
        shown = table.rows[:SHOWN_OF_LONG] if table.long else table.rows
        lines += [f"## {for_markdown(table.title)}", "", *_markdown_table(table.heads, shown), ""]
        rest = len(table.rows) - len(shown)
        lines += [f"and {rest:,} more: report.html has all", ""] if rest else []
    lines += [f"![{for_markdown(figure.stem)}](figures/{quote(figure.name)})" for figure in figures] + [""]
    lines += [f"- {key}: {for_markdown(value)}" for key, value in _facts(records, env)]
    if bad := bad_clips(records):
        lines += ["", f"## Bad clips ({len(bad):,})", "", *_markdown_table(BAD_COLUMNS, bad[:SHOWN_BAD_CLIPS])]
        lines += [f"\n{_more(bad)}"] if _more(bad) else []
    return "\n".join(lines) + "\n"


def _markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(for_markdown, cells)) + " |" for cells in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]


def _html(
    name: str,
    records: list[dict[str, Any]],
    result: dict[str, Any],
    env: dict[str, Any],
    figures: list[Path],
    tables: list[Table],
    recipe: str,
) -> str:
    parts = [f"<h1>{for_html(name)}</h1>", f'<p class="headline">{for_html(_headline(result))}</p>']
    parts += [f"<p>{for_html(remark)}</p>" for remark in _remarks(result, records)]
    if result:
        heads = "".join(f'<th class="number">{title}</th>' for _, title, _ in STAGE_COLUMNS)
        rows = "".join(
            f"<tr><td>{for_html(row[0])}</td>"
            + "".join(f'<td class="number">{cell}</td>' for cell in row[1:])
            + "</tr>"
            for row in _stage_rows(result)
        )
        parts.append(f"<h2>Stages</h2><table><tr><th>stage</th>{heads}</tr>{rows}</table>")
    parts += map(_html_table, tables)
    parts.append("<h2>How it went</h2>")
    for figure in figures:
        data = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f'<p><img alt="{for_html(figure.stem)}" src="data:image/png;base64,{data}"></p>')
    facts = "".join(f"<tr><td>{key}</td><td>{for_html(value)}</td></tr>" for key, value in _facts(records, env))
    parts.append(f'<h2>Where and with what</h2><table class="facts">{facts}</table>')
    if bad := bad_clips(records):
        heads = "".join(f"<th>{title}</th>" for title in BAD_COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{for_html(cell)}</td>" for cell in row) + "</tr>" for row in bad[:SHOWN_BAD_CLIPS]
        )
        parts.append(f"<h2>Bad clips ({len(bad):,})</h2><table><tr>{heads}</tr>{rows}</table><p>{_more(bad)}</p>")
    if recipe:
        parts.append(
            f"<h2>Recipe</h2><details><summary>resolved recipe</summary><pre>{for_html(recipe)}</pre></details>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{for_html(name)}</title><style>{STYLE}</style>" + ("".join(parts) + "</html>\n")
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{for_html(name)}</th>" for name in table.heads)
    rows = ["<tr>" + "".join(f"<td>{for_html(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    page = f"<h2>{for_html(table.title)}</h2>"
    if not table.long or len(rows) <= SHOWN_OF_LONG:
        return f"{page}<table><tr>{head}</tr>{''.join(rows)}</table>"
    first, rest = "".join(rows[:SHOWN_OF_LONG]), "".join(rows[SHOWN_OF_LONG:])
    more = f"<summary>and {len(rows) - SHOWN_OF_LONG:,} more</summary><table><tr>{head}</tr>{rest}</table>"
    return f"{page}<table><tr>{head}</tr>{first}</table><details>{more}</details>"


def _more(bad: list[tuple[str, str, str, str]]) -> str:
    rest = len(bad) - SHOWN_BAD_CLIPS
    return f"and {rest:,} more: log.jsonl names each (bad_sample)" if rest > 0 else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); run its stage again") from error
