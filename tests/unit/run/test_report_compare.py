"""Several runs on one page: differences, the paired test on the same clips, and means over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfa_dist.tools.cli import main

RECIPE = """\
name: NAME
seed: SEED
optimizer: {name: sgd, lr: 0.1}
schedule: {epochs: 1}
stage1: {frames: FRAMES, model: {size: tiny, classes: 2}, data: {train: [a.tar]}}
"""
CLIPS = 40


def make_run(folder: Path, right: range, seconds: float = 100.0, seed: int = 0, frames: int = 4) -> str:
    """A run over CLIPS clips of which those numbered `right` are right."""
    (folder / "test").mkdir(parents=True)
    recipe = RECIPE.replace("NAME", folder.name).replace("SEED", str(seed)).replace("FRAMES", str(frames))
    (folder / "recipe.yaml").write_text(recipe)
    lines: list[dict[str, Any]] = [
        {"kind": "train", "stage": "stage1", "step": 1, "loss": 1.0, "step_time": 2.0},
        {"kind": "eval", "stage": "stage1", "step": 1, "acc1": 0.5, "loss": 1.0},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = np.arange(CLIPS) % 2
    hits = np.isin(np.arange(CLIPS), right)
    np.savez(
        folder / "test" / "predictions.npz",
        keys=np.array([f"k{number}" for number in range(CLIPS)]),
        shards=np.array(["s.tar"] * CLIPS),
        labels=labels,
        heads=np.array([], dtype=np.str_),
        head_sizes=np.array([], dtype=np.int64),
        logits=np.eye(2, dtype=np.float32)[np.where(hits, labels, 1 - labels)],
    )
    stages = {"stage1": {"steps": 1, "seconds": seconds, "gpu_seconds": seconds}}
    result = {"acc1": hits.mean(), "acc5": 1.0, "samples": CLIPS, "views": 1, "total_seconds": seconds}
    (folder / "result.json").write_text(json.dumps({**result, "stages": stages, "cost_ratio": None}))
    return str(folder)


def compare(out: Path, *runs: str) -> str:
    assert main(["report", *runs, "--compare", "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    return out.with_suffix(".md").read_text()


def test_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", range(0, 20))
    mine = make_run(tmp_path / "mine", range(0, 30), seconds=62.0, frames=8)
    text = compare(tmp_path / "both.html", base, mine)
    assert "mine: top-1 75.00%, 25.00 points above base, in 0.62 times its seconds of training." in text
    assert "On the 40 clips that both were tested on, 0 are right in base alone and 10 in mine alone" in text
    assert "mine is better on them (McNemar, exact, p = 0.002)" in text
    assert "| base and mine | 40 | 0 | 10 | 0.002 |" in text
    assert "| stage1.frames | 4 | 8 |" in text
    assert "No two finished runs differ only in their seed" in text
    page = (tmp_path / "both.html").read_text()
    assert "<figcaption>Training loss over seconds</figcaption><svg" in page
    assert page.count('<ul class="legend">') == 4
    assert "both_stage1" not in page, "the page needs no other file"
    assert "## Curves of stage1\n\n![both\\_stage1](both_stage1.png)" in text
    with Image.open(tmp_path / "both_stage1.png") as picture:
        assert picture.size == (924, 660), "two rows of two plots"


def test_a_stage_of_any_name_writes_its_picture_beside_the_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs" / name, range(0, 2)) for name in ("a", "b")]
    log = Path(runs[0]) / "log.jsonl"
    log.write_text(log.read_text().replace('"stage1"', '"../../up"'))
    (tmp_path / "pages").mkdir()
    text = compare(tmp_path / "pages" / "both.html", *runs)
    assert "(both_______up.png)" in text
    assert {file.name for file in tmp_path.rglob("*.png")} == {"both_______up.png", "both_stage1.png"}


def test_the_same_score_is_neither_above_nor_below(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a", range(0, 20)), make_run(tmp_path / "b", range(0, 20))
    assert "b: top-1 50.00%, that of a too, in 1.00 times" in compare(tmp_path / "both.html", *runs)


def test_few_clips_show_no_difference(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a", range(0, 20)), make_run(tmp_path / "b", range(2, 24))
    text = compare(tmp_path / "both.html", *runs)
    assert "2 are right in a alone and 4 in b alone: no difference is shown (McNemar, exact, p = 0.69)." in text


def test_runs_that_differ_in_the_seed_alone_have_an_interval(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"s{seed}", range(0, 20 + 4 * seed), seed=seed) for seed in range(3)]
    text = compare(tmp_path / "seeds.html", *runs)
    assert "| s0, s1, s2 | 0, 1, 2 | 60.00% | 10.00 points | 35.16% to 84.84% |" in text
    assert "s1: top-1 60.00%, 10.00 points above s0, in" in text
    assert "Apart from names and seeds their recipes do not differ." in text


def test_what_a_run_lacks_is_said(tmp_path: Path) -> None:
    base, other = make_run(tmp_path / "base", range(0, 20)), make_run(tmp_path / "other", range(0, 9))
    (Path(other) / "result.json").unlink()
    (Path(other) / "test" / "predictions.npz").unlink()
    (Path(other) / "recipe.yaml").unlink()
    text = compare(tmp_path / "both.html", base, other)
    assert "other cannot be compared with base: no test result of other yet." in text
    assert "base and other cannot be tested in pairs: the run has no test/predictions.npz" in text
    assert "Without a recipe that this version reads: other." in text
    assert "No two runs can be tested in pairs." in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "--compare"], "--compare needs at least two runs"),
        (["RUN", "RUN", "--compare"], "each named once"),
        (["RUN", "--out", "x.html"], "--out is for --compare"),
        (["RUN", "OTHER", "--compare", "--out", "x.md"], "ends with .html"),
    ],
)
def test_words_that_are_no_comparison_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    places = {name: make_run(tmp_path / name, range(0, 2)) for name in ("RUN", "OTHER")}
    assert main(["report", *(places.get(word, word) for word in words)]) == 64
    assert told in capsys.readouterr().err
