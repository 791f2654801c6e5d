"""`sfa reproduce` on clips so small that a run takes a second: the rows of Table 1 that it trains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, Train, program, run_command, until
from tiny_runs import RECIPE, read_json, write_clips

from sfa_dist.boundary.file_names import LOG, WEIGHTS
from sfa_dist.errors import PreemptedError
from sfa_dist.tools import cli
from sfa_dist.tools.experiments import execution
from sfa_dist.tools.experiments.clips import STAMP
from sfa_dist.tools.experiments.execution import rank_variables
from sfa_dist.tools.experiments.rows import EXPERIMENTS
from sfa_dist.tools.experiments.scales import SCALES, ClipCounts, SmallScale
from sfa_dist.tools.reproduce import plan_of

COUNTS = ClipCounts(24, 9, 24, 10)
RANK_VARIABLES = rank_variables(2)[0].keys()
TRAINED = ["-", "I", "III", "V", "VI"]


class Forked:
    """A forked rank in the place of a fresh process."""

    started: list[tuple[str, ...]] = []

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]) -> None:
        own = {key: value for key, value in environ.items() if key in RANK_VARIABLES}
        if own.get("RANK", "0") == "0":
            self.started.append(tuple(words))
        self._run = Train(Path.cwd(), *words, **own)

    def send_signal(self, number: signal.Signals) -> None:
        self._run.send(number)

    def wait(self) -> int:
        finished = self._run.wait()
        sys.stderr.write(finished.err)
        return finished.code


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make_clips` would have made, of other clips."""
    folder = tmp_path_factory.mktemp("clips") / "data" / "reproduce_tiny"
    for seed, name in enumerate(("train", "test", "image_train", "image_test")):
        write_clips(folder / name, 24 if "train" in name else 9, seed)
    (folder / STAMP).write_text("24 9 24 10\n")
    return folder.parent


@pytest.fixture
def workplace(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "data").symlink_to(clips)
    (tmp_path / "t.yaml").write_text(RECIPE.replace("schedule: {epochs: 2, ", "schedule: {epochs: 1, "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SCALES, "tiny", SmallScale("tiny", COUNTS, epochs=1, recipe="t.yaml"))
    monkeypatch.setattr(execution, "start_rank", Forked)
    monkeypatch.setattr(Forked, "started", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield tmp_path
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def reproduce(*words: str) -> int:
    return cli.main(["reproduce", "table1", "--scale", "tiny", "--seeds", "1", "--ranks", "1", *words])


def test_table1(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("--out", "out") == 0, capsys.readouterr().err
    record = read_json(workplace / "out" / "table1.json")
    rows: dict[str, Any] = {row["row"]: row for row in record["rows"]}
    assert record["complete"]
    assert [name for name, row in rows.items() if row["seeds"]] == TRAINED
    assert rows["II"]["left_out"]
    # Two rows share the stage 1 that trains nothing, two the one that does, all five the image checkpoint.
    assert len(Forked.started) == 5 + 2 + 1
    assert rows["-"]["cost_ratio"] == rows["-"]["cost_ratio_everything"] == 1
    for row in (rows[name] for name in TRAINED):
        assert 0 <= row["acc1_interval"][0] <= row["acc1_mean"] <= row["acc1_interval"][1] <= 1
        assert row["seconds_everything"] > row["seconds"] > 0
        assert (row["interval_over"], row["seeds"], row["acc1_sd"]) == ("clips", [0], None)
    out = capsys.readouterr().out
    assert "63.85" in out
    assert "not trained, VideoMAE is not part of this package" in out
    assert {path.suffix for path in (workplace / "out").iterdir()} == {".json", ".md", ".png"}
    _row_six_trains_all_and_tests_what_it_trained(Path(rows["VI"]["runs"][0]), Path(rows["V"]["runs"][0]))
    # Again: nothing is run, and the tables are the same.
    Forked.started.clear()
    assert reproduce("--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert Forked.started == []
    assert [row.get("acc1") for row in again["rows"]] == [row.get("acc1") for row in record["rows"]]
    _what_is_done_depends_on_fixed_keys_and_clips(workplace)
    # Weights may go when the result is there.
    Path(rows["III"]["runs"][0], "stage2", WEIGHTS).unlink()
    # Only the run that is lost is made again.
    shutil.rmtree(rows["V"]["runs"][0])
    assert reproduce() == 0
    assert [words[-1] for words in Forked.started] == [rows["V"]["runs"][0]]


def _what_is_done_depends_on_fixed_keys_and_clips(workplace: Path) -> None:
    recipe, clips = workplace / "t.yaml", workplace / "data"
    before = recipe.read_text()

    def undone() -> set[str | None]:
        """Stages of the shared runs that are not done; None for a row's own run. All runs of a kind are alike."""
        rows, _ = plan_of(EXPERIMENTS["table1"], SCALES["tiny"], [0], {})
        done: dict[str | None, set[bool]] = {}
        for own in rows.values():
            for step in own[0]:
                done.setdefault(step.stage, set()).add(step.is_done({}))
        assert all(len(found) == 1 for found in done.values()), done
        return {stage for stage, found in done.items() if found == {False}}

    # Free keys: what an upgrade adds to recipes, or a user to this one.
    recipe.write_text(before.replace("every: 1", "every: 2") + "checkpoint: {keep: 1}\nactivation: checkpoint\n")
    assert undone() == set()
    # A Fixed key of the test: what is trained stays, the test is made again.
    recipe.write_text(before.replace("temporal_views: 2", "temporal_views: 1"))
    assert undone() == {None}
    recipe.write_text(before)
    assert undone() == set()
    # Other clips at the same place.
    where = clips.readlink()
    clips.unlink()
    shutil.copytree(where, clips)
    shutil.rmtree(clips / "reproduce_tiny" / "train")
    write_clips(clips / "reproduce_tiny" / "train", 24, seed=8)
    assert undone() == {"stage1", None}  # The image checkpoint has clips of its own.
    shutil.rmtree(clips)
    clips.symlink_to(where)


def _row_six_trains_all_and_tests_what_it_trained(six: Path, five: Path) -> None:
    whole, tail = (read_json(run / "stage2" / "done.json")["result"] for run in (six, five))
    assert whole["frozen_parameters"] == 0
    assert whole["trainable_parameters"] == tail["trainable_parameters"] + tail["frozen_parameters"]
    assert "freeze_trunk" in read_json(six / "stage2" / "done.json")["inputs"]
    assert "freeze_trunk" not in read_json(five / "stage2" / "done.json")["inputs"]


def test_a_stop_request_reaches_the_run_and_the_same_command_goes_on(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Forked.wait
    only_rows(monkeypatch, "-", "V")
    asked: list[bool] = []

    def stop_at_the_second_run(rank: Forked) -> int:
        if len(Forked.started) == 2 and not asked:  # Once: a second request ends the process at once.
            until(lambda: (Path(Forked.started[-1][-1]) / LOG).is_file())
            os.kill(os.getpid(), signal.SIGINT)
            asked.append(True)
        return real(rank)

    monkeypatch.setattr(Forked, "wait", stop_at_the_second_run)
    assert reproduce("--ranks", "2") == PreemptedError.exit_code
    assert "run the same command again to go on" in capsys.readouterr().err
    assert len(Forked.started) == 2
    monkeypatch.setattr(Forked, "wait", real)
    assert reproduce() == 0, capsys.readouterr().err  # On one rank now.
    assert len(Forked.started) == 2 + 3  # The first was done; the second goes on, then stage 1 and SFA.


def only_rows(monkeypatch: pytest.MonkeyPatch, *names: str, of: str = "table1") -> None:
    whole = EXPERIMENTS[of]
    some = tuple(row for row in whole.rows if row.name in names)
    monkeypatch.setitem(EXPERIMENTS, of, replace(whole, rows=some))


def test_the_cache_study_counts_the_extraction(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_rows(monkeypatch, "-", "K = 2", of="cache")
    words = ("--scale", "tiny", "--seeds", "1", "--ranks", "1", "--json")
    assert cli.main(["reproduce", "cache", *words]) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    baseline, cached = record["rows"]
    stages = read_json(Path(cached["runs"][0]) / "result.json")["stages"]
    assert stages["cache"]["views"] == 2
    (first,) = (workplace / "runs" / "reproduce" / "shared").glob("stage1-*")
    stages["stage1"] = read_json(first / "stage1" / "done.json")["result"]
    seconds = sum(stages[name]["seconds"] for name in ("stage1", "cache", "stage2"))
    assert stages["cache"]["seconds"] > 0
    assert cached["seconds"] == pytest.approx(seconds)
    assert cached["cost_ratio"] == pytest.approx(seconds / baseline["seconds"])
    assert cached["seconds_everything"] > seconds
    assert record["complete"]


def test_a_rerun_with_fewer_seeds_reports_all_that_are_finished(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_rows(monkeypatch, "-")
    assert reproduce("--seeds", "2", "--json") == 0
    (before,) = json.loads(capsys.readouterr().out)["rows"]
    assert before["seeds"] == [0, 1]
    second = Path(before["runs"][1])
    shutil.copytree(second, second.with_name("seed-2"))  # A run of another seed is not this seed's.
    Forked.started.clear()
    assert reproduce("--json") == 0
    shown = capsys.readouterr()
    (after,) = json.loads(shown.out)["rows"]
    assert Forked.started == []
    assert after == before
    assert "table1 -: seed 1 is finished too, and counts" in shown.err
    assert f"table1 -: seed 2 is not finished, and left out: {second.with_name('seed-2')}" in shown.err
    assert (workplace / "results" / "tiny" / "table1.json").is_file()
    assert not (workplace / "results" / "tiny" / "earlier-1").exists()
    # A run that is another one now is refused by name; what is finished stays in the tables, and the rest beside them.
    done = read_json(Path(before["runs"][0]) / "stage1" / "done.json")
    done["inputs"]["optimizer.lr"] = 0.7
    (Path(before["runs"][0]) / "stage1" / "done.json").write_text(json.dumps(done))
    assert reproduce() == 78
    assert "optimizer.lr: was 0.7, now 0.3" in capsys.readouterr().err
    (left,) = read_json(workplace / "results" / "tiny" / "table1.json")["rows"]
    (kept,) = read_json(workplace / "results" / "tiny" / "earlier-1" / "table1.json")["rows"]
    assert (left["seeds"], kept["seeds"]) == ([1], [0, 1])


def test_a_run_that_fails_ends_it_with_the_same_code(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "data").unlink()  # A link: the clips stay.
    (workplace / "data" / "reproduce_tiny").mkdir(parents=True)
    (workplace / "data" / "reproduce_tiny" / STAMP).write_text("24 9 24 10\n")
    assert reproduce() == 65
    error = capsys.readouterr().err
    assert "table1 - seed 0: the run in runs/reproduce/shared/image-" in error
    assert "failed with exit code 65, and says why above" in error


@pytest.mark.reproduce
@pytest.mark.timeout(3600)
def test_table1_at_the_scale_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to the table, by real processes on two ranks: ten minutes on two cores with nothing beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = run_command([program("sfa"), "reproduce", "table1", "--scale", "quick", "--seeds", "1"], tmp_path, 3600)
    assert done.code == 0, done.err
    record = read_json(tmp_path / "results" / "quick" / "table1.json")
    rows = {row["row"]: row for row in record["rows"] if row["seeds"]}
    assert list(rows) == TRAINED
    assert record["complete"]
    # Frozen rows skip the trunk's backward pass. Accuracies are not held: 600 steps are few.
    assert rows["I"]["cost_ratio"] < 1 < rows["VI"]["cost_ratio"]
