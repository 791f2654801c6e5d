"""Whole runs that die, or whose disk fails, at a named point of a save: an intact checkpoint is always there, and the
run goes on from it as if nothing had been."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Finished, train, train_ranks
from tiny_runs import RECIPE, events, log_lines, losses, make_workplace, sets

from sfa_dist.checkpoint import file_sha256, newest_valid
from sfa_dist.data.sampling.sample_plan import PLAN_VERSION
from sfa_dist.training.seeds import RANDOM_VERSION

STEPS = 12
ONE_STAGE = RECIPE[: RECIPE.index("image:\n")].replace("{name: sgd, lr: 0.3}", "{name: adamw, lr: 0.003}") + (
    'stage1: {frames: 4}\nlog: {every: 1, wandb: "off"}\n'
)
ONE_STAGE = ONE_STAGE.replace("schedule: {epochs: 2,", "checkpoint: {every_steps: 2, keep: 2}\nschedule: {epochs: 4,")
START = ("--recipe", "t.yaml", "--stage", "stage1", "--run-dir")
BEFORE_THE_RENAME = ("save.stage", "save.write", "save.between_files", "save.before_commit")
WAITED_FOR = sets("checkpoint.asynchronous=false")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("faults"), ONE_STAGE)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that nothing happened to."""
    finished = train(place, *START, "whole")
    assert finished.code == 0, finished.err
    return place / "whole"


@pytest.fixture(scope="module")
def whole_on_two(place: Path) -> Path:
    for rank in train_ranks(2, place, *START, "whole on two", *sets("engine.zero=3")):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    return place / "whole on two"


@pytest.fixture(scope="module")
def half(place: Path) -> Path:
    """A run that stands at step 5, with the checkpoints 4 and 5."""
    finished = train(place, *START, "half", *sets("stage1.schedule.max_steps=5"))
    assert finished.code == 0, finished.err
    assert steps(place / "half") == [4, 5]
    return place / "half"


@pytest.fixture
def copy(half: Path, tmp_path: Path) -> Path:
    """The half run in a folder of this test's own."""
    run = tmp_path / "copy"
    shutil.copytree(half, run)
    return run


def folder(run: Path) -> Path:
    return run / "stage1" / "checkpoints"


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder(run).iterdir())


def newest_step(run: Path) -> int:
    found, faults = newest_valid(folder(run))
    assert found is not None
    assert faults == []
    return int(found.name.removeprefix("step-"))


def assert_the_same(run: Path, whole: Path) -> None:
    """Every loss and norm, of steps that were run twice too, the weights' bytes, and nothing left of the save."""
    assert losses(run) == losses(whole)
    weights = Path("stage1") / "weights.safetensors"
    assert file_sha256(run / weights) == file_sha256(whole / weights)
    assert steps(run) == [STEPS - 2, STEPS]


def assert_one_line(finished: Finished, code: int, *words: str) -> None:
    assert finished.code == code, (finished.code, finished.err)
    assert finished.err.count("\n") == 1, finished.err
    for word in words:
        assert word in finished.err


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.fault(3, 4)
@pytest.mark.parametrize("how", [[], WAITED_FOR], ids=["asynchronous", "waited for"])
@pytest.mark.parametrize("point", [*BEFORE_THE_RENAME, "save.after_rename", "save.after_purge"])
def test_kill_9_at_each_point_of_a_save(place: Path, whole: Path, point: str, how: list[str]) -> None:
    name = f"{point} {bool(how)}"
    run, stands = place / name, 6 if point in BEFORE_THE_RENAME else 8
    died = train(place, *START, name, *how, SFA_FAILPOINT=f"{point}:kill@step=8,stage=stage1")
    assert died.code == -signal.SIGKILL, died.err
    assert newest_step(run) == stands
    finished = train(place, *START, name, *how)
    assert finished.code == 0, finished.err
    assert [event["step"] for event in events(run, "resume")] == [stands]
    assert events(run, "fallback") == []
    assert_the_same(run, whole)


@pytest.mark.fault(1, 3, 4)
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_one_of_two_ranks_while_it_writes(place: Path, whole_on_two: Path, victim: int) -> None:
    """ZeRO-3: each rank writes its part of the model file."""
    name = f"one of two {victim}"
    own = (*START, name, *sets("engine.zero=3"))
    ranks = train_ranks(2, place, *own, SFA_FAILPOINT=f"save.write:kill@step=8,rank={victim}")
    ended = [rank.wait() for rank in ranks]
    assert ended[victim].code == -signal.SIGKILL
    assert ended[1 - victim].code == 70, ended[1 - victim].err
    assert newest_step(place / name) == 6
    for rank in train_ranks(2, place, *own):
        finished = rank.wait()
        assert finished.code == 0, finished.err
    assert_the_same(place / name, whole_on_two)


def test_a_save_that_is_waited_for_is_the_same_save(place: Path, whole: Path) -> None:
    """The slow twin: the same losses, and the same bytes of parameters and moments."""
    finished = train(place, *START, "waited for", *WAITED_FOR)
    assert finished.code == 0, finished.err
    run = place / "waited for"
    assert_the_same(run, whole)
    for step in (STEPS - 2, STEPS):
        one, other = (folder(each) / f"step-{step:08d}" for each in (run, whole))
        assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
        for file in one.glob("*.safetensors"):
            assert file.read_bytes() == (other / file.name).read_bytes()


# ------------------------------------------------------------------------------------------------ the disk


@pytest.mark.fault(18, 19)
@pytest.mark.parametrize(("error", "words"), [("enospc", "no space left, needed"), ("eio", "input/output error")])
def test_a_rank_whose_disk_fails_is_named_by_all(place: Path, error: str, words: str) -> None:
    name = f"disk {error}"
    own = (*START, name, *sets("engine.zero=3", "schedule.epochs=40"))
    ranks = train_ranks(2, place, *own, SFA_FAILPOINT=f"save.write:{error}@step=4,rank=1")
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [74, 74]
    where = str(folder(Path(name)) / "step-00000004.tmp")
    assert_one_line(ended[0], 74, "rank 1 on ", where, words, "older checkpoints are untouched")
    assert ended[1].err == ""
    assert steps(place / name) == [2, 3]  # Step 3 ends an epoch.
    assert newest_step(place / name) == 3
    last = max(line["step"] for line in log_lines(place / name) if line["kind"] == "train")
    assert last < 16  # Of 120: the thread needs a while to fail, the ranks one step to hear of it.


@pytest.mark.fault(10)
def test_a_stop_request_while_a_save_is_in_flight_waits_for_it(place: Path, whole: Path) -> None:
    run = place / "stopped in flight"
    started = train(place, *START, "stopped in flight", SFA_FAILPOINT="save.write:term@step=4")
    assert started.code == 75, started.err
    [preempted] = events(run, "preempted")
    assert newest_step(run) == preempted["step"] >= 4
    assert {event["step"] for event in events(run, "checkpoint")} >= {4, preempted["step"]}
    finished = train(place, *START, "stopped in flight")
    assert finished.code == 0, finished.err
    assert_the_same(run, whole)


@pytest.mark.fault(30)
def test_a_network_disk_that_stumbles_while_it_is_read(copy: Path, place: Path, whole: Path) -> None:
    finished = train(place, *START, str(copy), SFA_FAILPOINT="load.read:estale@times=1;load.read:eio@times=1")
    assert finished.code == 0, finished.err
    assert [event["step"] for event in events(copy, "resume")] == [5]
    assert events(copy, "fallback") == []
    assert losses(copy) == losses(whole)


# ------------------------------------------------------------------------------------------------ what was saved


def rewrite(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes state.json of the newest checkpoint, and the manifest with it, so that it is taken for intact."""
    path = max(folder(run).iterdir())
    file, manifest = path / "state.json", path / "MANIFEST.json"
    state, listed = json.loads(file.read_text()), json.loads(manifest.read_text())
    change(state)
    file.write_text(json.dumps(state))
    listed["files"]["state.json"] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    manifest.write_text(json.dumps(listed))
    return path


def test_the_state_tells_where_data_and_random_numbers_stand(half: Path) -> None:
    state = json.loads((folder(half) / "step-00000005" / "state.json").read_text())
    assert state["step"] == state["progress"]["step"] == 5
    assert state["origin"] == {
        "seed": 0,
        PLAN: PLAN_VERSION,
        RANDOM: RANDOM_VERSION,
        CLIPS: state["inputs"][CLIPS],
    }
    assert state["data"] == {"epoch": 1, "step_in_epoch": 2}
    assert state["probe"]["loss"] > 0


PLAN, RANDOM, CLIPS, TRUNK = (
    *("sample plan (version)", "random numbers (version)"),
    *("train clips (sha256)", "frozen trunk (sha256)"),
)
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "plan": (lambda state: state["origin"].update({PLAN: 0}), f"{PLAN}: was 0, now {PLAN_VERSION}"),
    "random": (lambda state: state["origin"].update({RANDOM: 0}), f"{RANDOM}: was 0, now {RANDOM_VERSION}"),
    "clips": (lambda state: state["origin"].update({CLIPS: "abc"}), f"{CLIPS}: was 'abc', now "),
    "trunk": (lambda state: state.update({"trunk_sha256": "abc"}), f"{TRUNK}: was 'abc', now None"),
}


@pytest.mark.fault(26, 45)
@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_of_other_data_is_refused_by_the_field(
    copy: Path, place: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    rewrite(copy, change)
    assert_one_line(train(place, *START, str(copy)), 78, words)
    assert steps(copy) == [4, 5]


def test_a_checkpoint_that_computes_something_else_is_refused(copy: Path, place: Path) -> None:
    """By one unit in the last place, on the same engine, ranks, device and versions."""
    told: list[float] = []

    def change(state: dict[str, Any]) -> None:
        told.append(state["probe"]["loss"])
        state["probe"]["loss"] = math.nextafter(told[0], math.inf)

    path = rewrite(copy, change)
    finished = train(place, *START, str(copy))
    assert_one_line(finished, 74, str(path), repr(told[0]), repr(math.nextafter(told[0], math.inf)), "bit for bit")


def test_elsewhere_the_probe_may_differ_by_rounding_and_no_more(copy: Path, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(copy, other)

    def change(factor: float) -> Callable[[dict[str, Any]], None]:
        def by(state: dict[str, Any]) -> None:
            state["probe"]["loss"] *= factor
            state["probe"]["place"]["ranks"] = 64

        return by

    rewrite(copy, change(1.0005))
    finished = train(place, *START, str(copy))
    assert finished.code == 0, finished.err
    rewrite(other, change(1.01))
    assert_one_line(train(place, *START, str(other)), 74, "the loss of its probe was", "wanted within")
