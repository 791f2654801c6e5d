"""What a run tells: log.jsonl exactly, the console readably, wandb if it can."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.report.run_files import read_log
from sfa_dist.run.tracking import Tracker, clock, eval_line, train_line

TRAIN = {
    "stage": "stage1",
    "step": 3,
    "epoch": 0,
    "samples_seen": 24,
    "loss": 0.1 + 0.2,
    "lr": 1e-3,
    "grad_norm": 1 / 3,
    "step_time": 0.5,
    "data_time": 0.1,
    "samples_per_second": 16.0,
    "memory_gib": 0.7,
    "mfu": None,
    "bad_samples": 0,
}
OFF = LogBlock(wandb="off")


def tracker(folder: Path, log: LogBlock = OFF, **environ: str) -> Tracker:
    return Tracker(folder, log, {"name": "t"}, {"HOME": "/nowhere", **environ})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_record_is_one_json_object_with_its_kind_first(tmp_path: Path) -> None:
    log = tracker(tmp_path / "run")
    log.record("train", **TRAIN)
    log.event("checkpoint", stage="stage1", step=3)
    log.close()
    train, event = lines(tmp_path / "run")
    assert list(train) == ["kind", *TRAIN]
    assert train == {"kind": "train", **TRAIN}
    assert event == {"kind": "event", "event": "checkpoint", "stage": "stage1", "step": 3}


def test_floats_are_written_to_the_last_bit(tmp_path: Path) -> None:
    log = tracker(tmp_path)
    values = [0.1 + 0.2, math.pi * 1e-30, 1 / 3, float(2**60 + 1)]
    log.record("eval", values=values, one=values[0])
    assert lines(tmp_path)[0]["values"] == values
    assert lines(tmp_path)[0]["one"] == values[0]
    log.close()


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_json_has_no_number_for_is_text(tmp_path: Path, value: float, text: str) -> None:
    log = tracker(tmp_path)
    log.record("train", **{**TRAIN, "loss": value})
    log.close()
    assert lines(tmp_path)[0]["loss"] == text
    assert float(text) == pytest.approx(value, nan_ok=True)


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = tracker(tmp_path)
    log.record("train", **TRAIN)
    log.say("hello [1/2] [bold]")
    assert len(lines(tmp_path)) == 1
    assert (tmp_path / "console.log").read_text() == "hello [1/2] [bold]\n"
    log.close()


def test_a_second_start_goes_on_in_the_same_files(tmp_path: Path) -> None:
    for step in (1, 2):
        log = tracker(tmp_path)
        log.record("train", **{**TRAIN, "step": step})
        log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_line_cut_by_a_kill_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "event", "event": "start"}\n{"kind": "tra')
    log = tracker(tmp_path)
    log.event("resume", stage="stage1", step=2)
    log.close()
    assert [record["event"] for record in read_log(tmp_path / "log.jsonl")] == ["start", "resume"]


def test_other_ranks_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    log = Tracker(None, LogBlock(wandb="offline"), {}, {})
    log.say("hello")
    log.record("train", **TRAIN)
    log.event("start")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_dry_run_speaks_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    log = Tracker.console_only(LogBlock(wandb="offline"))
    log.say("hello")
    log.event("start")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == "hello\n"


# ------------------------------------------------------------------------------------------------ wandb


@pytest.mark.fault(68)
def test_wandb_offline_keeps_one_run_over_restarts(tmp_path: Path, capfd: Any) -> None:
    ids = []
    for _ in range(2):
        log = tracker(tmp_path, LogBlock(wandb="auto"))
        log.record("train", **TRAIN)
        log.record("eval", stage="test", step=0, acc1=0.5)
        log.close()
        ids.append((tmp_path / "wandb" / "run_id").read_text())
    assert not [line for line in lines(tmp_path) if line.get("event") == "wandb_off"]
    assert ids[0] == ids[1]
    runs = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run")]
    assert runs
    assert {path.name.rsplit("-", 1)[1] for path in runs} == {ids[0]}
    assert capfd.readouterr() == ("", ""), "no banner, no question"


class FakeRun:
    """What wandb.init gives, as far as it is used here."""

    def __init__(self, log_error: Exception | None = None) -> None:
        self.logged: list[dict[str, Any]] = []
        self.log_error = log_error
        self.finished = 0

    def log(self, values: dict[str, Any]) -> None:
        if self.log_error:
            raise self.log_error
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_the_same_keys_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    log = tracker(tmp_path, LogBlock(wandb="offline"))
    log.record("train", **{**TRAIN, "loss": math.nan})
    log.record("eval", stage="stage1", step=3, acc1=0.5)
    log.record("eval", stage="test", step=0, acc1=0.6)
    log.event("done")
    log.close()
    train, val, test = run.logged
    assert train["train/step"] == 3
    assert train["train/grad_norm"] == 1 / 3
    assert {key for key in train if key.startswith("perf/")} == {
        "perf/step_time",
        "perf/data_time",
        "perf/samples_per_second",
        "perf/memory_gib",
    }
    assert val == {"stage": "stage1", "val/step": 3, "val/acc1": 0.5}
    assert test == {"stage": "test", "test/step": 0, "test/acc1": 0.6}
    assert run.finished == 1


@pytest.mark.parametrize(
    ("wanted", "environ", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, None),
        ("online", {"WANDB_API_KEY": "x"}, "online"),
        ("online", {}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),
        ("offline", {"WANDB_API_KEY": "x"}, "offline"),
        ("off", {"WANDB_API_KEY": "x"}, None),
    ],
)
def test_wandb_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Any, environ: dict[str, str], mode: str | None
) -> None:
    asked: list[str] = []

    def init(**options: Any) -> FakeRun:
        asked.append(options["mode"])
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    tracker(tmp_path, LogBlock(wandb=wanted), **environ).close()
    assert asked == ([mode] if mode else [])


@pytest.mark.parametrize(
    ("text", "environ", "mode"),
    [
        ("machine api.wandb.ai login user password x\n", {}, "online"),
        ("machine example.org login user password x\n", {}, "offline"),
        ("machine own.host login user password x\n", {"WANDB_BASE_URL": "https://own.host:8080/a"}, "online"),
        ("machine own.host", {}, "offline"),
    ],
    ids=["key", "another's", "own server", "cut"],
)
def test_a_netrc_has_a_key_only_where_it_names_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, environ: dict[str, str], mode: str
) -> None:
    """Without one wandb would ask for it, and the run would wait."""
    asked: list[str] = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options["mode"]) or FakeRun())
    (tmp_path / ".netrc").write_text(text)
    (tmp_path / ".netrc").chmod(0o600)
    tracker(tmp_path / "run", LogBlock(wandb="auto"), HOME=str(tmp_path), **environ).close()
    assert asked == [mode]


@pytest.mark.fault(68)
def test_a_run_goes_on_where_wandb_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def init(**_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(wandb, "init", init)
    log = tracker(tmp_path, LogBlock(wandb="online"), WANDB_API_KEY="x")
    log.record("train", **TRAIN)
    log.close()
    train, off = sorted(lines(tmp_path), key=lambda line: line["kind"], reverse=True)  # It is begun beside the run.
    assert off == {"kind": "event", "event": "wandb_off", "reason": "OSError: no network"}
    assert train["step"] == 3
    assert capfd.readouterr().err == "wandb is off for this run: OSError: no network\n"


@pytest.mark.fault(68)
def test_a_run_goes_on_where_wandb_fails_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(RuntimeError("socket closed")))
    log = tracker(tmp_path, LogBlock(wandb="offline"))
    for step in (1, 2):
        log.record("train", **{**TRAIN, "step": step})
    log.close()
    found = [line.get("step", line.get("reason")) for line in lines(tmp_path)]
    assert sorted(found, key=str) == [1, 2, "RuntimeError: socket closed"]
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.fault(68)
@pytest.mark.parametrize("stopping", [False, True])
def test_a_service_of_wandb_that_is_ended_is_told_in_a_line(tmp_path: Path, stopping: bool) -> None:
    """deepspeed's launcher ends it at a Ctrl-C, as all processes below it: then the run ends too, and log.jsonl is
    enough."""
    program = (
        "import os, sys, time, psutil\n"
        "from pathlib import Path\n"
        "from sfa_dist.recipe.blocks import LogBlock\n"
        "from sfa_dist.run.tracking import Tracker\n"
        "log = Tracker(Path(sys.argv[1]), LogBlock(wandb='offline'), {}, dict(os.environ), stopping=lambda: "
        f"{stopping})\n"
        "while log._trackers._sinks[0]._run is None:\n"
        "    time.sleep(0.01)\n"
        "children = psutil.Process().children(recursive=True)\n"
        "assert children\n"
        "for child in children:\n"
        "    child.kill()\n"
        "psutil.wait_procs(children, 20)\n"
        "log.record('train', step=1, loss=1.0)\n"
        "log.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"" if stopping else r"wandb is off for this run: .+\n", done.stderr)
    assert [line["event"] for line in lines(tmp_path) if line["kind"] == "event"] == ["wandb_off"]


# ------------------------------------------------------------------------------------------------ console lines


def test_console_lines() -> None:
    assert train_line("stage1 [1/2][3/6]", TRAIN, 3725.0) == (
        "Train stage1 [1/2][3/6] loss: 0.3000 lr: 1.000e-03 grad_norm: 0.333 time: 0.500 data_time: 0.100 "
        "clips/s: 16.0 memory: 0.70 GiB eta: 1:02:05"
    )
    result = {"acc1": 0.5, "acc5": 1.0, "loss": 0.25, "samples": 9}
    assert eval_line("stage1 [1/2]", result) == "Eval stage1 [1/2] acc1: 0.5000 acc5: 1.0000 loss: 0.2500 clips: 9"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (3600, "1:00:00"), (2 * 86400 + 3 * 3600, "2 d 03:00:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
