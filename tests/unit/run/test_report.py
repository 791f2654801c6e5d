"""The report says what the run directory holds, also where it holds little or something half-written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sfa_dist.run.report.page import write_report
from sfa_dist.run.report.run_files import latest_by_step, read_log
from sfa_dist.tools.cli import main

STAGE = {
    "steps": 4,
    "seconds": 12.0,
    "gpu_seconds": 24.0,
    "peak_memory_gib": 1.5,
    "trainable_parameters": 1_234_567,
    "frozen_parameters": 0,
    "optimizer_bytes_per_rank": 7_407_402,
    "bad_samples": 2,
}
RESULT = {
    "acc1": 0.8125,
    "acc5": 1.0,
    "loss": 0.5,
    "samples": 1600,
    "views": 3,
    "frames": 16,
    "stages": {"stage1": STAGE, "stage2": {**STAGE, "frozen_parameters": 999}},
    "total_seconds": 24.0,
    "cost_ratio": None,
}
ENV = {
    "sfa_dist": "0.1.0",
    "commit": "abc123",
    "versions": {"torch": "2.11", "torchcodec": None},
    "decoder": "PyAV 18",
    "launcher": "torchrun",
    "ranks": [{"host": "node1", "device": "H100"}, {"host": "node2", "device": "H100"}],
}


def train(step: int, loss: Any, stage: str = "stage1") -> dict[str, Any]:
    return {"kind": "train", "stage": stage, "step": step, "loss": loss}


def evaluation(step: int, acc1: float, stage: str = "stage1", **more: Any) -> dict[str, Any]:
    return {"kind": "eval", "stage": stage, "step": step, "acc1": acc1, **more}


def event(name: str) -> dict[str, Any]:
    return {"kind": "event", "event": name}


RECORDS = [
    event("start"),
    train(1, 2.0),
    train(2, 1.5),
    event("checkpoint"),
    train(3, 9.0),
    event("fallback"),
    event("resume"),
    train(3, 1.2),
    train(4, 1.1),
    evaluation(4, 0.5),
    train(1, 1.0, "stage2"),
    evaluation(1, 0.6, "stage2"),
    evaluation(0, 0.8, "test"),
    evaluation(0, 0.2, "test", frame_order="shuffled"),
]


def tables_of(text: str) -> list[list[str]]:
    """The lines of each table of a Markdown text."""
    return [re.findall(r"^\|.*$", part, re.MULTILINE) for part in text.split("\n\n") if part.startswith("|")]


def write_run(folder: Path, records: list[dict[str, Any]], cut: str = "") -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + cut)
    return folder


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "my <run>", RECORDS)
    (run / "result.json").write_text(json.dumps(RESULT))
    (run / "env.json").write_text(json.dumps(ENV))
    (run / "recipe.yaml").write_text("name: my <run>\n")
    return run


def test_the_page_holds_result_stages_curves_and_recipe(finished: Path) -> None:
    page = write_report(finished).read_text()
    assert "top-1 81.25%, top-5 100.00% on 1,600 clips (3 views)" in page
    assert "1,234,567" in page
    assert '<meta name="viewport"' in page
    for title in ("Loss over steps", "Validation top-1 over steps"):
        assert page.count(f"<figcaption>{title}</figcaption><svg") == 2
    assert "2 on 2 hosts, H100" in page
    assert "torch 2.11" in page
    assert "torchcodec" not in page
    assert "1 resume, 1 fallback" in page
    assert "name: my &lt;run&gt;" in page
    assert "<run>" not in page


def test_the_page_needs_no_other_file(finished: Path) -> None:
    page = write_report(finished).read_text()
    assert "http" not in page
    assert "src=" not in page.replace('src="data:', "")


def test_the_markdown_is_a_table_with_links_to_the_figures(finished: Path) -> None:
    write_report(finished)
    text = (finished / "report.md").read_text()
    [rows] = [table for table in tables_of(text) if table[0].startswith("| stage | steps")]
    assert [row.split("|")[1].strip() for row in rows] == ["stage", "---", "stage1", "stage2"]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[3].split("|")[7].strip() == "999"
    for name in ("train_loss", "eval_acc1"):
        assert f"](figures/{name}.png)" in text
        assert (finished / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_writing_it_again_gives_the_same(finished: Path) -> None:
    first = write_report(finished).read_text()
    assert write_report(finished).read_text() == first


def test_steps_that_were_run_again_count_once_the_last_time() -> None:
    stages = latest_by_step(RECORDS, "train")
    assert [(row["step"], row["loss"]) for row in stages["stage1"]] == [(1, 2.0), (2, 1.5), (3, 1.2), (4, 1.1)]
    assert list(stages) == ["stage1", "stage2"]


def test_the_control_with_shuffled_frames_is_no_score_of_its_own() -> None:
    assert [row["acc1"] for row in latest_by_step(RECORDS, "eval")["test"]] == [0.8]


@pytest.mark.parametrize("cut", ['{"kind": "train", "stage": "sta', "\x00\x00\x00", "{\n"])
def test_a_last_line_that_a_kill_cut_is_left_out(tmp_path: Path, cut: str) -> None:
    run = write_run(tmp_path / "run", RECORDS, cut)
    assert read_log(run / "log.jsonl") == RECORDS
    assert write_report(run).is_file()


def test_bytes_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RECORDS)
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"kind"')
    assert read_log(run / "log.jsonl") == RECORDS


def test_a_run_that_goes_on_has_a_report_without_a_result(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RECORDS[:3])
    page = write_report(run).read_text()
    assert "No test result yet." in page
    assert page.count("<figcaption>Loss over steps</figcaption><svg") == 1
    assert "No stage&#x27;s numbers yet" in page


def test_a_run_that_has_only_started_has_a_report(tmp_path: Path) -> None:
    assert "No test result yet." in write_report(write_run(tmp_path / "run", [event("start")])).read_text()


def test_losses_that_are_no_number_leave_gaps_in_the_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [train(1, 2.0), train(2, "nan"), train(3, 1.0), train(1, "nan", "stage2")])
    assert re.search(r"<path d=\"M[\d. ]+M[\d. ]+\"", write_report(run).read_text()), "two strokes, none between"


def test_the_command_writes_it_and_says_where(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out == f"{finished / 'report.html'}\n"


def test_the_command_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 64
    assert "is not a run directory" in capsys.readouterr().err


def test_the_ledger_of_bad_clips_names_shard_key_and_reason(tmp_path: Path) -> None:
    def bad(key: str, reason: str, stage: str) -> dict[str, Any]:
        return {"kind": "event", "event": "bad_sample", "stage": stage, "step": 1, "key": key, "reason": reason}

    records = [
        bad("b.tar/x/y", "cut | <here>", "stage1"),
        bad("a.tar/z", "crc32 mismatch", "stage1"),
        bad("b.tar/x/y", "cut | <here>", "stage2"),
        *(bad(f"c.tar/{n:04d}", "empty file", "stage1") for n in range(600)),
    ]
    page = write_report(write_run(tmp_path / "run", records)).read_text()
    text = (tmp_path / "run" / "report.md").read_text()
    assert "<caption>Bad clips (602)</caption>" in page
    assert '<th scope="row">b.tar</th><td>x/y</td><td>cut | &lt;here&gt;</td><td>stage1, stage2</td>' in page
    assert "and 102 more: log.jsonl names each" in page
    assert "| a.tar | z | crc32 mismatch | stage1 |\n" in text
    assert "| b.tar | x/y | cut \\| \\<here\\> | stage1, stage2 |\n" in text
    assert "and 102 more" in text


NAMES = (
    *("<script>alert(1)</script>", "\x1b[2J\x1b[31mred", "a|b", "a\nb\r\n| c |", "`x` *y* _z_", "[l](javascript:x)"),
    *("$x^2$", "$\\frac{", "a\\", "![i](http://h/x.png)", "<!--", "&lt;", "\u202eabc", "é" * 60, "", "# h", "\x9b31m"),
)


def test_names_of_classes_are_shown_as_they_are(finished: Path) -> None:
    """And are no commands to a terminal, a browser, Markdown or a picture."""
    numbers = range(len(NAMES))
    head = {
        "names": {str(number): name for number, name in enumerate(NAMES)},
        "classes": [[number, 1, 2] for number in numbers],
        "confusion": [[number, other, 1] for number in numbers for other in (number, (number + 1) % len(NAMES))],
    }
    (finished / "test").mkdir()
    (finished / "test" / "classes.json").write_text(json.dumps({"heads": {"label": head}}))
    page = write_report(finished).read_text()
    text = (finished / "report.md").read_text()
    for shown in (page, text):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
        assert "\\x1b[2J" in shown.replace("\\\\", "\\").replace("\\[", "[")
    assert "<script" not in page
    assert "<!--" not in page
    plain = re.sub(r"\\.", "", text)
    assert not re.search(r"[<`]|\]\((?!figures/)", plain)
    assert len(tables_of(plain)) == 6
    for table in tables_of(plain):
        assert len({row.count("|") for row in table}) == 1, "no name has made a cell or a line of its own"
    assert (finished / "figures" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_an_old_run_tells_no_password(finished: Path) -> None:
    (finished / "recipe.yaml").write_text("data: {train: ['https://me:S3cr3tMark@h/x.tar?sig=S3cr3tMark']}\n")
    page = write_report(finished).read_text()
    assert "S3cr3tMark" not in page
    assert "h/x.tar" in page


# ---------------------------------------------------------------------------------------------- better than chance

GUESSED = {"classes": 2, "chance_acc1": 0.5, "majority_acc1": 0.5, "predicted_classes": 1, "better_than_chance": False}


@pytest.mark.parametrize("page", ["report.html", "report.md"])
def test_the_report_says_what_chance_is_and_when_a_score_is_no_better(finished: Path, page: str) -> None:
    line = {**RESULT, "acc1": 0.5, "samples": 60, "mean_class_acc1": 0.5, "temporal_views": 1, "spatial_views": 1}
    (finished / "result.json").write_text(json.dumps({**line, **GUESSED, "by_views": [{**line, **GUESSED}]}))
    write_report(finished)
    text = (finished / page).read_text()
    for words in (
        "By chance 50.00%, by always naming the largest class 50.00%; 1 of 2 classes predicted.",
        "One class predicted, the same for all 60 clips.",
        "No better than chance: top-1 50.00% on 60 clips, guessing 50.00%.",
        "sfa check-learning",
    ):
        assert words in text
    assert "100.00" not in text, "of two classes the best five hold every answer"


def test_a_member_of_a_sweep_that_guesses_is_marked(finished: Path) -> None:
    member = {"settings": {"optimizer.lr": 0.1}, "trainable_parameters": 9, "acc5": 1.0, "loss": 1.0, **GUESSED}
    learned = {**member, "member": "m001", "acc1": 0.9, "better_than_chance": True}
    lines = [{**member, "member": "m000", "acc1": 0.5}, learned]
    (finished / "result.json").write_text(json.dumps({**RESULT, "sweep": lines}))
    write_report(finished)
    text = (finished / "report.md").read_text()
    assert "| m000 (no better than chance) | 0.1 | 9 | 50.00% | 1.0000 |" in text
    assert "| m001 | 0.1 | 9 | 90.00% | 1.0000 |" in text
