"""The parts of a report: its plots, its verdict, what is known of each clip, and its pictures of clips."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import encode, video_bytes, write_shard
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from sfa_dist.data.shards.reader import read_clip_bytes
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.parallel.process_state import state_of
from sfa_dist.recipe.blocks import DataBlock
from sfa_dist.run.report import clips, svg
from sfa_dist.run.report.clips import MOST_BYTES, choose, clip_section, strip
from sfa_dist.run.report.curves import SECONDS, StageLog
from sfa_dist.run.report.document import Clips, Code, Matrix, Page, Plot, Plots, Section, Series, Table, Text
from sfa_dist.run.report.energy import energy_blocks
from sfa_dist.run.report.facts import run_sections
from sfa_dist.run.report.outcomes import NoOutcomesError, Outcomes, read_outcomes
from sfa_dist.run.report.png import draw_png
from sfa_dist.run.report.run_files import RunFiles, read_run
from sfa_dist.run.report.to_html import html_page
from sfa_dist.run.report.to_markdown import markdown_page
from sfa_dist.run.report.verdict import verdict_lines
from sfa_dist.training import prediction_file

# ------------------------------------------------------------------------------------------------------------ plots


def test_a_curve_has_a_stroke_on_each_side_of_a_gap() -> None:
    drawn = svg.draw(Plot("loss", "step", [Series("a", [(1, 2.0), (2, 1.0), (3, None), (4, 1.0), (5, 0.5)])]))
    [path] = re.findall(r'<path d="(M[^"]+)" class="line', drawn)
    assert (path.count("M"), path.count("L")) == (2, 2)
    assert 'aria-label="loss by step: a from 2 to 0.5, lowest 0.5, highest 2"' in drawn


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    points = [(float(number), 1.0) for number in range(10_000)]
    kept = svg.thin(points)
    assert len(kept) == svg.MOST_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert len(svg.draw(Plot("loss", "step", [Series("a", points)]))) < 8000


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
@example(0.0, 5e-324)
@example(1e-320, 0.0)
def test_ticks_span_what_is_drawn_and_can_be_told_apart(low: float, width: float) -> None:
    ticks = svg.ticks(low, low + width)
    assert 2 <= len(ticks) <= 8
    if low + width > low and width > 1e-6 * abs(low):
        apart = ticks[1] - ticks[0]
        assert ticks[0] <= low + apart * 1e-6
        assert ticks[-1] >= low + width - apart * 1e-6


def test_a_plot_without_a_number_is_drawn() -> None:
    assert "no numbers" in svg.draw(Plot("loss", "step", [Series("a", [(1, None)])]))


def test_a_picture_shows_all_curves_where_one_has_a_single_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **more: (drawn.append(self), save(self, *given, **more))
    )
    many, single = Series("many", [(0, 1.0), (90, 0.5)]), Series("single", [(3, 0.7)])
    draw_png([Plot("loss", "step", [many, single]), Plot("loss", "step", [single])], tmp_path / "x.png")
    wide, narrow = (axis.get_xlim() for axis in drawn[0].axes)
    assert wide[0] <= 0
    assert wide[1] >= 90
    assert narrow == (2, 4)


def test_steps_are_whole_and_the_clock_counts_the_steps_alone() -> None:
    assert svg.ticks(1, 1, least=1.0) == [0, 1, 2]
    log = StageLog([{"step": 10, "step_time": 2.0}, {"step": 20, "step_time": 1.0}], [{"step": 15}, {"step": 21}])
    assert [second for second, _ in log.points(log.evaluations, lambda row: 1, SECONDS)] == [25.0]


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_for_keyboards_and_readers_too() -> None:
    table = Table("Scores <b>", ["run", "top-1"], [[f"r{n}", "1"] for n in range(12)], long=True)
    matrix = Matrix("Confusion", ["a", "b"], [[3, 1], [0, 2]])
    plots = Plots([Plot("loss", "step", [Series("<i>", [(1, 2.0)]), Series("b", [(1, 1.0)])])])
    page = html_page(Page("x", "y", [Section("All", [table, matrix, plots, Code("recipe", "a: 1"), Text("&")])]))
    assert page.startswith('<!doctype html><html lang="en">')
    assert '<a class="skip" href="#main">' in page
    assert '<main id="main"' in page
    assert page.count("<table") == page.count("<caption>") == page.count('role="region"') == 3
    assert page.count("<svg") == page.count('role="img" aria-label=') + page.count('aria-hidden="true"')
    assert page.count('<th scope="row">') == 12 + 2
    assert page.count("<details><summary>") == 2
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert "<i>" not in page
    assert "<b>" not in page


# ------------------------------------------------------------------------------------------------------- the verdict

KNOWN = {"classes": 2, "chance_acc1": 0.5, "majority_acc1": 0.5, "predicted_classes": 2, "better_than_chance": True}
RESULT: dict[str, Any] = {"acc1": 0.8, "samples": 100, "total_seconds": 60.0, "cost_ratio": None, **KNOWN}


def run_of(result: dict[str, Any], directory: Path = Path("run")) -> RunFiles:
    return RunFiles(directory, [], result, {}, "", {}, [])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "Better than chance: top-1 80.00%, guessing 50.00%."),
        ({}, "95 % interval of top-1 by clips (Wilson): 71.1% to 86.7%."),
        ({}, "The control with shuffled frames was not measured"),
        ({"acc1_shuffled_frames": 0.5}, "below that interval: the score depends on the order of the frames."),
        ({"acc1_shuffled_frames": 0.75}, "within that interval"),
        ({"acc1_shuffled_frames": 0.9}, "above that interval"),
        ({}, "Its cost beside end-to-end training is not in result.json"),
        ({"cost_ratio": 0.62}, "0.62 times what end-to-end training costs"),
        (
            {"cost_ratio": 1.5, "cost_ratio_source": "measured", "cost_ratio_terms": {"baseline": "runs/b"}},
            "costs (measured: runs/b); sfa plan says why it is above 1.",
        ),
        ({"cost_ratio_reason": "stage 2 is not finished"}, "result.json (cost_ratio): stage 2 is not finished."),
        ({"better_than_chance": False, "acc1": 0.5}, "No better than chance: top-1 50.00%"),
    ],
)
def test_the_verdict_says(more: dict[str, Any], words: str) -> None:
    assert words in " ".join(verdict_lines(run_of({**RESULT, **more})))


def test_the_verdict_of_an_older_run_says_what_it_does_not_know() -> None:
    line = {key: value for key, value in RESULT.items() if key not in KNOWN}
    assert "Whether this is better than chance is not recorded" in verdict_lines(run_of(line))[0]


# --------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(("device", "words"), [("cpu", "this run had none"), ("NVIDIA H200", "| stage1 | 0.0")])
def test_memory_is_compared_with_its_plan_where_there_are_gpus(tmp_path: Path, device: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    stages = {"stage1": {"peak_memory_gib": 1.5}}
    (tmp_path / "result.json").write_text(json.dumps({**RESULT, "stages": stages}))
    (tmp_path / "env.json").write_text(json.dumps({"ranks": [{"host": "a", "device": device}]}))
    text = markdown_page(Page("x", "y", run_sections(read_run(tmp_path))))
    assert words in text
    assert ("| 1.50 | +" in text) == (device != "cpu")


def test_events_are_counted_and_starts_told(tmp_path: Path) -> None:
    lines = [{"kind": "event", "event": "checkpoint", "stage": "stage1", "step": step} for step in (5, 10)]
    notice = {"kind": "event", "event": "notice", "stage": "stage1", "text": "3 of 9 are shorter and looped"}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, notice]))
    attempt = {"began": "2026", "identity": "", "code": 74, "stage": "stage1", "step": 10, "error": "no | space"}
    (tmp_path / "attempts.json").write_text(json.dumps([attempt]))
    (tmp_path / "env.json").write_text(json.dumps({"command": "train.py --recipe r"}))
    text = markdown_page(Page("x", "y", run_sections(read_run(tmp_path))))
    assert "| checkpoint | stage1 | 2 | 5 | 10 |" in text
    assert "| 2026 | 74 | stage1 | 10 | no \\| space |" in text
    assert "| command | train.py --recipe r |" in text
    assert "\nstage1: 3 of 9 are shorter and looped\n" in text
    assert "No bad clips were reported." in text


def test_energy_is_told_by_stage_or_why_not() -> None:
    measured = {"energy_joules": 7_200_000.0, "samples_seen": 3600}
    resumed = {"energy_joules": None, "energy_reason": "the stage took several starts"}
    stages = {"image": {}, "stage1": measured, "cache": {}, "stage2": resumed}
    text = markdown_page(Page("x", "y", [Section("Stages", energy_blocks(run_of({"stages": stages})))]))
    assert "| stage | kJ | kWh | J per training clip |" in text
    assert "| stage1 | 7,200.0 | 2.0000 | 2,000.00 |" in text
    assert "Energy of stage2: the stage took several starts." in text
    assert "Energy of image: not recorded by the version that trained it." in text
    assert energy_blocks(run_of({})) == []


# ---------------------------------------------------------------------------------------------------------- outcomes


def save(folder: Path, **columns: Any) -> Path:
    (folder / "test").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "test" / "predictions.npz", **columns)
    return folder


def about(count: int) -> dict[str, Any]:
    names = {"keys": np.array([f"k{n}" for n in range(count)]), "shards": np.array(["s.tar"] * count)}
    return {**names, "heads": np.array([], dtype=np.str_), "head_sizes": np.array([], dtype=np.int64)}


def test_two_heads_are_right_together(tmp_path: Path) -> None:
    logits = np.log(np.array([[0.6, 0.4, 0.1, 0.2, 0.7], [0.6, 0.4, 0.5, 0.3, 0.2]], dtype=np.float32))
    heads = {"heads": np.array(["noun", "verb"]), "head_sizes": np.array([2, 3]), "noun_classes": np.array(["a", "b"])}
    heads["verb_classes"] = np.array(["x", "y", "z"])
    run = save(tmp_path, **{**about(2), **heads}, labels=np.array([[0, 2], [0, 1]]), logits=logits)
    found = read_outcomes(run)
    assert found.right.tolist() == [True, False]
    assert found.probability == pytest.approx([0.42, 0.3])
    assert (found.words(found.labels[1]), found.words(found.predicted[1])) == ("a, y", "a, x")


def test_of_many_classes_the_best_is_known_and_no_probability(tmp_path: Path) -> None:
    top = {"top_classes": np.array([[7, 3]]), "top_logits": np.zeros((1, 2), dtype=np.float32)}
    found = read_outcomes(save(tmp_path, **about(1), **top, labels=np.array([7])))
    assert (found.right.tolist(), found.probability, found.words(found.labels[0])) == ([True], None, "7")


@pytest.mark.parametrize("heads", [{}, {"noun": 2, "verb": 3}])
@pytest.mark.parametrize("many", [False, True])
def test_parquet_tells_the_same_as_npz(tmp_path: Path, heads: dict[str, int], many: bool) -> None:
    labels = np.array([[0, 2], [0, 1], [1, 1]]) if heads else np.array([0, 4, 2])
    shard = np.array([0, 1, 1])
    index: Any = SimpleNamespace(keys=["k0", "k1", "k2"], shards=["d/a.tar", "b.tar"], shard=shard, label=labels)
    scores = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    ranked = {f"{head}_top_classes" if heads else "top_classes": np.array([[1, 0]] * 3) for head in heads or [""]}
    columns: dict[str, Any] = ranked if many else {"logits": scores}
    facts = {"heads": np.array(list(heads), dtype=np.str_), "head_sizes": np.array(list(heads.values()), np.int64)}
    names = {f"{head}_classes": ["<a>", "b", "c"][:size] for head, size in heads.items()} or {"classes": list("abcde")}
    facts |= {key: np.array(value, dtype=np.str_) for key, value in names.items()}
    facts |= {"views": np.array([1, 3]), "average": np.array("logits")}
    found = []
    for kind, write in (("npz", prediction_file._write_npz), ("parquet", prediction_file._write_parquet)):
        folder = tmp_path / kind / "test"
        folder.mkdir(parents=True)
        write(folder / f"predictions.{kind}", index, np.arange(3), columns, facts)
        found.append(read_outcomes(tmp_path / kind))
    one, other = found
    assert (one.shards, one.keys, one.names) == (other.shards, other.keys, other.names)
    assert one.shards == ["a.tar", "b.tar", "b.tar"]
    assert (one.labels == other.labels).all()
    assert (one.predicted == other.predicted).all()
    assert (one.probability is None) == (other.probability is None) == many
    assert many or (one.probability == other.probability).all()  # type: ignore[union-attr]


def test_the_later_of_two_files_counts_and_a_lacking_reader_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, **about(1), labels=np.array([0]), logits=np.zeros((1, 2), dtype=np.float32))
    parquet = tmp_path / "test" / "predictions.parquet"
    parquet.write_bytes(b"PAR1 cut")
    os.utime(parquet, ns=(0, 0))
    assert read_outcomes(tmp_path).keys == ["k0"]
    (tmp_path / "test" / "predictions.npz").unlink()
    with pytest.raises(NoOutcomesError, match=r"test/predictions.parquet cannot be read \(ArrowInvalid"):
        read_outcomes(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoOutcomesError, match="needs pyarrow, which is not installed: pip install pyarrow"):
        read_outcomes(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"text"])
def test_predictions_that_cannot_be_read_are_words(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(NoOutcomesError, match=r"the run has no test/predictions.npz"):
        read_outcomes(tmp_path)
    save(tmp_path, keys=np.array([]))
    with pytest.raises(NoOutcomesError, match="cannot be read"):
        read_outcomes(tmp_path)
    (tmp_path / "test" / "predictions.npz").write_bytes(content)
    with pytest.raises(NoOutcomesError, match="cannot be read"):
        read_outcomes(tmp_path)


# ------------------------------------------------------------------------------------------------- pictures of clips


def test_the_surest_clip_of_each_class_comes_first() -> None:
    labels = np.array([[0], [0], [0], [1], [1]])
    predicted = np.array([[0], [0], [0], [1], [0]])
    found = Outcomes([], [], labels, predicted, np.array([0.9, 0.8, 0.7, 0.4, 0.6]), [["a", "b"]])
    assert choose(found, is_right=True) == [0, 3, 1, 2]
    assert choose(found, is_right=False) == [4]


def test_a_strip_is_small_whatever_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 80, 142, 3), dtype=np.uint8)
    jpeg = strip(torch.from_numpy(noise))
    assert Image.open(io.BytesIO(jpeg)).size == (4 * 142 + 6, 80)
    assert len(jpeg) <= MOST_BYTES
    monkeypatch.setattr(clips, "QUALITIES", clips.QUALITIES[:1])
    assert len(strip(torch.from_numpy(noise))) > MOST_BYTES


RECIPE = """\
name: x
optimizer: {name: sgd, lr: 0.1}
schedule: {epochs: 1}
stage1:
  frames: 4
  model: {size: tiny, classes: 2}
  data: {train: ["TRAIN"], val: ["VAL"], decoder: pyav, workers: 0}
"""


def test_clips_are_shown_where_their_shards_can_be_read(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    clip = encode([np.full((16, 16, 3), 40 * number, np.uint8) for number in range(5)])
    write_shard(shards / "s.tar", [("k0", clip, 0), ("k1", clip, 1)])
    logits = np.array([[2.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    names = {"classes": np.array(["<left>", "right"])}
    save(tmp_path, **about(3), **names, labels=np.array([0, 1, 1]), logits=np.concatenate([logits, logits[:1]]))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("VAL", str(shards / "*.tar")))
    (tmp_path / "result.json").write_text(json.dumps({"acc1": 1 / 3, "samples": 3}))
    section = clip_section(read_run(tmp_path))
    [shown] = [block for block in section.blocks if isinstance(block, Clips)]
    assert [(each.key, each.label, each.predicted, each.right) for each in shown.clips] == [
        ("s.tar/k0", "<left>", "<left>", True),
        ("s.tar/k1", "right", "<left>", False),
    ]
    assert shown.clips[0].probability == pytest.approx(1 / (1 + np.exp(-2)))
    assert Text("1 of 3 clips cannot be shown: unreadable, or changed.") in section.blocks
    page = html_page(Page("x", "y", [section]))
    assert page.count("data:image/jpeg;base64,") == 2
    assert "<left>" not in page


def run_of_clips(folder: Path, *files: bytes) -> RunFiles:
    """A run that was tested on the files, each of them right."""
    count, shards = len(files), folder / "shards"
    shards.mkdir()
    write_shard(shards / "s.tar", [(f"k{number}", data, 0) for number, data in enumerate(files)])
    save(folder, **about(count), labels=np.zeros(count, np.int64), logits=np.array([[2.0, 0.0]] * count, np.float32))
    (folder / "recipe.yaml").write_text(RECIPE.replace("VAL", str(shards / "*.tar")))
    (folder / "result.json").write_text(json.dumps({"acc1": 1.0, "samples": count}))
    return read_run(folder)


def shown_and_told(section: Section) -> tuple[list[str], list[str]]:
    """(keys of the clips that are shown, what is said behind them)."""
    [shown] = [block for block in section.blocks if isinstance(block, Clips)]
    told = [block.words for block in section.blocks if isinstance(block, Text)]
    return [each.key for each in shown.clips], told[1:]


def test_a_broken_file_costs_its_picture(tmp_path: Path) -> None:
    run = run_of_clips(tmp_path, video_bytes(), video_bytes()[:900], b"text", video_bytes())
    assert shown_and_told(clip_section(run)) == (
        ["s.tar/k0", "s.tar/k3"],
        ["2 of 4 clips cannot be shown: unreadable, or changed."],
    )


FILES = [video_bytes(frames) for frames in (3, 4, 5)]


@pytest.mark.parametrize(
    ("fault", "at", "seconds", "shown", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), 1, 120, ["s.tar/k0", "s.tar/k2"], "ended by SIGSEGV"),
        (lambda: os._exit(9), 2, 120, ["s.tar/k0", "s.tar/k1"], "ended with code 9"),
        (lambda: time.sleep(600), 0, 1, [], "had 1 s for all clips"),
    ],
)
def test_a_decoder_that_crashes_or_never_returns_costs_pictures_and_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[], None],
    at: int,
    seconds: float,
    shown: list[str],
    how: str,
) -> None:
    def opener(data: DataBlock) -> Any:
        def open_video(content: bytes) -> Any:
            if content == FILES[at]:
                fault()
            return decoder_of(data).open(content)

        return SimpleNamespace(open=open_video)

    monkeypatch.setattr(clips, "decoder_of", opener)
    monkeypatch.setattr(clips, "SECONDS", seconds)
    section = clip_section(run_of_clips(tmp_path, *FILES))
    lost = f"{3 - len(shown)} of 3 clips cannot be shown: unreadable, or changed."
    assert shown_and_told(section) == (shown, [lost, f"The decoder {how} at s.tar/k{at}."])


def test_an_error_in_the_program_is_told_and_raised_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(shards: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(clips, "load_index", broken)
    [told] = clip_section(run_of_clips(tmp_path, FILES[0])).blocks
    assert told == Text("No clips are shown: their shards cannot be read here (RuntimeError: a bug).")


def test_whatever_a_clip_does_costs_its_own_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(index: SampleIndex, sample: int) -> bytes:
        if sample == 1:
            raise MemoryError
        return read_clip_bytes(index, sample)

    monkeypatch.setattr(clips, "read_clip_bytes", read)
    lost = "1 of 3 clips cannot be shown: unreadable, or changed."
    assert shown_and_told(clip_section(run_of_clips(tmp_path, *FILES))) == (["s.tar/k0", "s.tar/k2"], [lost])


def test_a_stop_request_ends_the_wait_for_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "_picture", lambda *_: time.sleep(600))
    began = time.monotonic()
    section = clip_section(run_of_clips(tmp_path, *FILES), stopped=lambda: True)
    assert time.monotonic() - began < 60
    assert shown_and_told(section)[1][-1] == "The decoder was stopped at s.tar/k0."


def test_the_process_of_the_pictures_ends_with_a_parent_that_is_killed() -> None:
    program = """
import os, sys, time
from sfa_dist.run.report.apart import made_apart
def make(first):
    print(os.getpid(), flush=True)
    time.sleep(600)
    yield None
made_apart(1, make, 600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 60
    while state_of(child) is not None:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("pattern", ["gone/*.tar", "http://127.0.0.1:9/s.tar", "s3://b/s.tar", "pipe:touch ran"])
def test_shards_that_are_not_here_are_words_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, **about(1), labels=np.array([0]), logits=np.zeros((1, 2), dtype=np.float32))
    allowed = "remote: {allow: [http, pipe], cache_dir: kept}"
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("VAL", pattern).replace("workers: 0", allowed))
    [told] = clip_section(read_run(tmp_path)).blocks
    assert isinstance(told, Text)
    why = "no shard matches" if pattern == "gone/*.tar" else "only shards on a disk are read"
    assert told.words.startswith(f"No clips are shown: their shards cannot be read here ({why}")
    assert not (tmp_path / "ran").exists()
