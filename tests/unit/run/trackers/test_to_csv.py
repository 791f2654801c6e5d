"""CSV files: a row for each line, and no step twice."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from tracked_lines import evaluation, train

from sfa_dist.run.trackers.to_csv import CsvSink


def write(folder: Path, *lines: dict[str, Any]) -> None:
    """One start of a run that writes these lines."""
    sink = CsvSink(folder)
    sink.load()
    sink.open()
    for line in lines:
        sink.write(line)
    sink.close()


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "csv" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str, key: str) -> list[str]:
    return [row[key] for row in rows(folder, name)]


def test_a_file_for_each_stage_and_kind(tmp_path: Path) -> None:
    write(tmp_path, train(1, loss=1 / 3), evaluation(1, 0.5), train(1, stage="stage2"), evaluation(0, 0.25, "test"))
    names = sorted(path.name for path in (tmp_path / "csv").iterdir())
    assert names == ["stage1-eval.csv", "stage1-train.csv", "stage2-train.csv", "test-eval.csv"]
    text = (tmp_path / "csv" / "stage1-train.csv").read_text()
    assert text == f"step,loss,step_time,mfu\n1,{1 / 3},0.25,\n"
    assert rows(tmp_path, "test-eval.csv") == [
        {"step": "0", "acc1": "0.25", "better_than_chance": "", "member": "", "frame_order": ""}
    ]


def test_what_is_not_finite_and_what_needs_quotes(tmp_path: Path) -> None:
    write(tmp_path, train(1, loss="nan", note='a "b", c\nd'))
    assert rows(tmp_path, "stage1-train.csv")[0]["loss"] == "nan"
    assert rows(tmp_path, "stage1-train.csv")[0]["note"] == 'a "b", c\nd'


def test_a_resume_from_an_earlier_step_replaces_what_it_computes_again(tmp_path: Path) -> None:
    write(tmp_path, *(train(step, loss=step) for step in range(1, 8)), evaluation(4, 0.4), train(1, stage="stage2"))
    write(tmp_path, train(5, loss=50), train(6, loss=60), evaluation(8, 0.8))
    assert column(tmp_path, "stage1-train.csv", "step") == ["1", "2", "3", "4", "5", "6"]
    assert column(tmp_path, "stage1-train.csv", "loss") == ["1", "2", "3", "4", "50", "60"]
    assert column(tmp_path, "stage1-eval.csv", "acc1") == ["0.4", "0.8"]
    assert column(tmp_path, "stage2-train.csv", "step") == ["1"]


def test_a_test_that_is_made_again_replaces_its_rows_and_keeps_all_views(tmp_path: Path) -> None:
    lines = [evaluation(0, 0.5, "test", views=1), evaluation(0, 0.6, "test", views=4)]
    lines += [evaluation(0, 0.3, "test", views=4, frame_order="shuffled")]
    for _ in range(2):
        write(tmp_path, *lines)
    assert column(tmp_path, "test-eval.csv", "views") == ["1", "4", "4"]
    assert column(tmp_path, "test-eval.csv", "frame_order") == ["", "", "shuffled"]


def test_members_of_a_sweep_resume_each_from_its_own_step(tmp_path: Path) -> None:
    both = [train(step, member=member) for step in (1, 2, 3) for member in ("m000", "m001")]
    write(tmp_path, *both)
    write(tmp_path, train(2, member="m001"), train(3, member="m000"), train(3, member="m001"))
    found = {(row["member"], row["step"]) for row in rows(tmp_path, "stage1-train.csv")}
    assert found == {(line["member"], str(line["step"])) for line in both}
    assert len(rows(tmp_path, "stage1-train.csv")) == len(both)


def test_a_row_that_a_kill_has_cut_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, train(1), train(2))
    path = tmp_path / "csv" / "stage1-train.csv"
    path.write_text(path.read_text()[:-7])
    write(tmp_path, train(3))
    assert column(tmp_path, "stage1-train.csv", "step") == ["1", "3"]


def test_a_later_version_adds_columns_and_a_key_without_one_is_refused(tmp_path: Path) -> None:
    write(tmp_path, train(1))
    write(tmp_path, train(2, energy=7))
    assert column(tmp_path, "stage1-train.csv", "energy") == ["", "7"]
    with pytest.raises(ValueError, match="surprise"):
        write(tmp_path, train(3), train(4, surprise=1))
