"""The tables of scores: of each of the tested views, and of the members of a sweep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sfa_dist.run.chance import heads_of, shows_top5
from sfa_dist.run.report.document import Table

SCORES = {"acc1": "top-1", "acc5": "top-5"}


def views_tables(result: dict[str, Any]) -> list[Table]:
    """The scores over each of the tested views, by head where there are several."""
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
    """Of a sweep its members, and means over seeds where there are several."""
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
    """Behind a member's name: whether validation has chosen it (without any it has chosen none), and whether it is no
    better than chance."""
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
