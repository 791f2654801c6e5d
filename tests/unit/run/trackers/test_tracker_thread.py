"""No tracker ends a run, slows it or holds up its end."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tracked_lines import evaluation, train

from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.trackers.background import Background, Failure
from sfa_dist.run.trackers.sink import Line, curves
from sfa_dist.run.tracking import Tracker


class Kept:
    """A tracker in memory. `gate` holds up each line; `broken` names a call that fails."""

    name = "kept"

    def __init__(self, gate: threading.Event | None = None, broken: str = "") -> None:
        self.lines: list[Line] = []
        self.calls: list[str] = []
        self.gate, self.broken = gate, broken

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.broken:
            raise OSError(f"no {name}")

    def load(self) -> None:
        self._call("load")

    def open(self) -> None:
        self._call("open")

    def write(self, line: Line) -> None:
        self._call("write")
        if self.gate is not None:
            self.gate.wait()
        self.lines.append(line)

    def close(self) -> None:
        self._call("close")

    def abandon(self) -> None:
        self._call("abandon")
        if self.gate is not None:
            self.gate.set()


class Other(Kept):
    name = "other"


def test_lines_arrive_in_their_order_and_the_end_waits_for_them() -> None:
    sink = Kept()
    background = Background([sink])
    sent = [train(step) for step in range(100)]
    assert all(background.send(line) for line in sent)
    assert background.close()
    assert sink.lines == sent
    assert sink.calls == ["load", "open", *["write"] * 100, "close"]
    assert (background.failures(), background.dropped) == ([], 0)


@pytest.mark.fault(68)
@pytest.mark.parametrize("broken", ["load", "open", "write", "close"])
def test_a_tracker_that_fails_is_switched_off_and_the_others_go_on(broken: str) -> None:
    bad, good = Kept(broken=broken), Other()
    background = Background([bad, good], stopping=lambda: True)
    sent = [train(1), train(2)]
    for line in sent:
        background.send(line)
    assert background.close()
    assert good.lines == sent
    assert background.failures() == [Failure("kept", f"OSError: no {broken}", quiet=True)]
    assert background.failures() == []
    assert bad.calls.count(broken) == 1
    assert bad.calls[-1] == "close"  # What it had begun is ended.


def test_a_full_queue_drops_and_counts(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run does not wait: the gate opens only after all lines were sent."""
    gate = threading.Event()
    sink = Kept(gate)
    monkeypatch.setattr("sfa_dist.run.tracking.sinks_of", lambda *_: [sink])
    monkeypatch.setattr("sfa_dist.run.tracking.Background", lambda sinks, stopping: Background(sinks, stopping, 3))
    log = Tracker(tmp_path, LogBlock(), {}, {})
    while not sink.calls[2:]:  # The thread holds the first line.
        log.record("train", **{key: value for key, value in train(0).items() if key != "kind"})
        time.sleep(0.001)
    for step in range(20):
        log.record("eval", stage="stage1", step=step)
    gate.set()
    log.close()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    [dropped] = [record for record in records if record.get("event") == "trackers_dropped"]
    sent = sum(record["kind"] != "event" for record in records)
    assert dropped["lines"] >= 20 - 3
    assert len(sink.lines) == sent - dropped["lines"]
    first, last = capfd.readouterr().err.splitlines()
    assert first == "kept: too far behind, lines are left out from here on; log.jsonl has all"
    assert last == f"kept: {dropped['lines']} lines left out; log.jsonl has all"


def test_the_end_does_not_wait_for_a_tracker_that_hangs(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Kept(threading.Event())
    monkeypatch.setattr("sfa_dist.run.tracking.sinks_of", lambda *_: [sink])
    monkeypatch.setattr("sfa_dist.run.tracking.Background", lambda *a: Background(*a, flush_seconds=0.05))
    log = Tracker(tmp_path, LogBlock(), {}, {})
    log.record("train", stage="stage1", step=1)
    log.close()
    assert "abandon" in sink.calls
    assert capfd.readouterr().err == "kept: not done after 0.05 s, the last lines are left out; log.jsonl has all\n"
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last == {"kind": "event", "event": "trackers_unfinished", "trackers": "kept", "seconds": 0.05}


@pytest.mark.fault(68)
def test_a_service_of_wandb_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """wandb's own exit handler would wait for it without a bound."""
    program = (
        "import os, sys, time, psutil\n"
        "from pathlib import Path\n"
        "from sfa_dist.parallel.process_exit import exit_process\n"
        "from sfa_dist.recipe.blocks import LogBlock\n"
        "from sfa_dist.run import tracking\n"
        "from sfa_dist.run.trackers.background import Background\n"
        "tracking.Background = lambda *given: Background(*given, flush_seconds=0.5)\n"
        "log = tracking.Tracker(Path(sys.argv[1]), LogBlock(wandb='offline'), {}, dict(os.environ))\n"
        "while log._trackers._sinks[0]._run is None:\n"
        "    time.sleep(0.01)\n"
        "for child in psutil.Process().children(recursive=True):\n"
        "    child.suspend()\n"
        "log.record('train', stage='stage1', step=1, loss=1.0)\n"
        "log.close()\n"
        "exit_process(0)\n"
    )
    err = tmp_path / "err"  # No pipe: a process of wandb that is left would keep it open.
    with err.open("w") as file:
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], stderr=file, timeout=300)
    assert done.returncode == 0, err.read_text()
    assert "wandb: not done after 0.5 s, the last lines are left out; log.jsonl has all\n" in err.read_text()
    assert "Traceback" not in err.read_text()


def test_the_names_of_curves() -> None:
    line = train(3, loss="nan", member="m001", lr=1e-3, flag=True)
    assert dict(curves(line)) == {"train/m001/step": 3, "train/m001/lr": 1e-3, "perf/step_time": 0.25}
    assert dict(curves(evaluation(3, 0.5))) == {"val/step": 3, "val/acc1": 0.5}
    assert dict(curves(evaluation(0, 0.5, "test"))) == {"test/step": 0, "test/acc1": 0.5}
    control = evaluation(0, 0.4, "test", frame_order="shuffled")
    assert dict(curves(control)) == {"test/shuffled_frames/step": 0, "test/shuffled_frames/acc1": 0.4}
