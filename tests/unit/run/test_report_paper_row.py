"""A run as a row of the paper's tables: what the model is called, the numbers, and where the cost ratio comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfa_dist.run.report.document import Code, Items, Page, Section, Table
from sfa_dist.run.report.paper_row import paper_blocks
from sfa_dist.run.report.run_files import RunFiles, read_run
from sfa_dist.run.report.to_html import html_page
from sfa_dist.run.report.to_markdown import markdown_page

SFA = """\
name: x
optimizer: {name: sgd, lr: 0.1}
schedule: {epochs: 1}
model: {size: L, classes: 174}
data: {train: [a.tar]}
stage1: {frames: 8}
stage2: {frames: 128}
"""
END_TO_END = SFA.replace("stage2: {frames: 128}", "").replace("frames: 8", "frames: 128")
STAGES = {
    "image": {"steps": 500, "seconds": 9999.0},
    "stage1": {"steps": 1200, "seconds": 3600.0},
    "stage2": {"steps": 800, "seconds": 5400.0},
}
RESULT: dict[str, Any] = {"acc1": 0.63852, "acc5": 0.87618, "samples": 100, "classes": 174, "stages": STAGES}
MEASURED = {
    "cost_ratio": 0.6213,
    "cost_ratio_source": "measured",
    "cost_ratio_terms": {"seconds": 9000.0, "baseline_seconds": 14486.0, "baseline": "runs/base"},
}
CALIBRATED = {
    "cost_ratio": 0.6,
    "cost_ratio_source": "calibrated",
    "cost_ratio_terms": {"seconds": 9000.0, "baseline_seconds": 15000.0, "timed_steps": 5},
    "cost_ratio_reason": "log.baseline runs/b has no finished stage 1",
}


def run_of(folder: Path, recipe: str | None = SFA, **result: Any) -> RunFiles:
    folder.mkdir(exist_ok=True)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe)
    (folder / "result.json").write_text(json.dumps({**RESULT, **result}))
    return read_run(folder)


def row_of(run: RunFiles) -> list[str]:
    [table] = [block for block in paper_blocks({run.name: run}) if isinstance(block, Table)]
    assert table.heads == ("model", "top-1", "top-5", "steps", "train time", "cost ratio")
    [row] = table.rows
    return list(row)


def test_a_row_is_that_of_table_6(tmp_path: Path) -> None:
    row = row_of(run_of(tmp_path / "r", **MEASURED))
    assert row == ["ViViT-L 128f + SFA 8f", "63.85", "87.62", "1,200 + 800", "2.50 h", "0.62x"]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("x", "x", "ViViT-L 128f + SFA 8f"),
        (
            "stage1: {",
            "stage1: {image_checkpoint: a.npz, schedule: {epochs: 0}, ",
            "ViViT-L 128f, spatial frozen, adapter, without stage 1",
        ),
        ("frames: 128", "frames: 128, adapter: null", "ViViT-L 128f, spatial frozen, no adapter, from 8f"),
        ("frames: 128", "frames: 128, freeze_trunk: false", "ViViT-L 128f, nothing frozen, adapter, from 8f"),
        ("size: L", "size: L, width: 96", "ViViT-L (modified) 128f + SFA 8f"),
        ("stage2: {frames: 128}", "", "ViViT-L 8f"),
        (SFA, "not a recipe", "r 16f"),
    ],
)
def test_what_is_not_sfa_is_not_called_so(tmp_path: Path, old: str, new: str, name: str) -> None:
    assert row_of(run_of(tmp_path / "r", SFA.replace(old, new), frames=16))[0] == name


def test_nouns_and_verbs_and_few_classes(tmp_path: Path) -> None:
    epic = {"noun_acc1": 0.5678, "noun_acc5": 0.9, "verb_acc1": 0.6516, "verb_acc5": 0.9, "action_acc5": 0.9}
    assert row_of(run_of(tmp_path / "r", **epic))[1] == "63.85 (noun 56.78, verb 65.16)"
    assert row_of(run_of(tmp_path / "r", classes=4))[2] == "-"


@pytest.mark.parametrize(
    ("recipe", "result", "ratio", "told"),
    [
        (SFA, MEASURED, "0.62x", "Cost ratio: measured: runs/base."),
        (SFA, CALIBRATED, "0.60x", "calibrated: 5 timed steps (log.baseline runs/b has no finished stage 1)."),
        (SFA, {"cost_ratio": None, "cost_ratio_reason": "not asked for"}, "-", "Cost ratio: none: not asked for."),
        (SFA, {}, "-", "none: the run is of an older version"),
        (SFA, {"cost_ratio": 0.7}, "0.70x", "of an older version, which recorded no source"),
        (END_TO_END, {"cost_ratio": None}, "1.00x", "1 by definition: the run is trained end to end."),
        (END_TO_END.replace("{frames", "{weights: w, frames"), {"cost_ratio": None}, "-", "the train time is without"),
    ],
)
def test_the_ratio_says_where_it_comes_from(
    tmp_path: Path, recipe: str, result: dict[str, Any], ratio: str, told: str
) -> None:
    run = run_of(tmp_path / "r", recipe, **result)
    assert row_of(run)[-1] == ratio
    [notes] = [block for block in paper_blocks({"r": run}) if isinstance(block, Items)]
    assert told in " ".join(notes.lines)


def test_several_runs_have_their_names_and_can_be_copied(tmp_path: Path) -> None:
    runs = {name: run_of(tmp_path / name, seed, **MEASURED) for name, seed in (("a|b", SFA), ("base", END_TO_END))}
    runs["still running"] = read_run(tmp_path / "none")
    blocks = paper_blocks(runs)
    [to_copy] = [block for block in blocks if isinstance(block, Code)]
    assert to_copy.text.splitlines()[2].startswith(r"| ViViT-L 128f + SFA 8f (a\|b) | 63.85 | 87.62 |")
    page = Page("x", "y", [Section("Rows", blocks)])
    assert to_copy.text in markdown_page(page)
    assert '<pre class="copied" tabindex="0">| model |' in html_page(page)
    assert "still running" not in html_page(page)


def test_without_a_result_there_is_no_row(tmp_path: Path) -> None:
    assert paper_blocks({"r": read_run(tmp_path)}) == []
