"""`sfa chaos`: its promise, and that the command tells, cleans up and ends."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import until

from sfa_dist.chaos.all_trials import select
from sfa_dist.chaos.bench import Bench, References
from sfa_dist.chaos.builtin import write_builtin
from sfa_dist.chaos.oracle import log_lines
from sfa_dist.chaos.trials import Options, Trial, play_all
from sfa_dist.chaos.workplace import Workplace, make_workplace
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.tools.cli import main

ROOT = Path(__file__).resolve().parents[2]
KILLS = 3
LIMIT = 180.0  # Seconds: a command imports torch twice, and the machine may be busy.
ROWS_OF_THE_CATALOGUE = range(1, 71)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("chaos")
    return make_workplace(
        folder / "place", load_recipe(write_builtin(folder / "builtin")), "the built-in recipe", 12, False
    )


@pytest.fixture(scope="module")
def references(place: Workplace) -> References:
    return References(place)


# ------------------------------------------------------------------------------------------------ the promise itself


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("ranks", [1, 2])
def test_random_kill_points(place: Workplace, references: References, ranks: int) -> None:
    """The short variant; `make chaos` runs 50 on 1 rank and on 2, and all other trials."""
    [result] = play_all(select(["kill-anywhere"]), references, [ranks], Options(rounds=KILLS))
    assert result.passed, result
    assert result.seen.startswith(f"{KILLS} kills in ")
    assert not (place.folder / "trials" / f"kill-anywhere-on-{ranks}").exists()


def test_signals_reach_whom_they_should(references: References, tmp_path: Path) -> None:
    """A rank alone, a rank with its workers, and nothing of a job is left when the bench closes."""
    with Bench(references, tmp_path / "bench", 1, random.Random(0)).closing() as bench:
        job = bench.start(sets=("data.workers=1",))
        bench.until_step(job, 1)
        job.send(signal.SIGSTOP)
        [worker, *_] = job.workers(0)
        job.send(signal.SIGCONT)
        job.send_to_groups(signal.SIGSTOP)
        until(lambda: {state(job.pids[0]), state(worker)} == {"T"}, LIMIT)
        job.send(signal.SIGCONT)
        until(lambda: state(job.pids[0]) not in ("T", None), LIMIT)
        assert state(worker) == "T"
        job.send_to_groups(signal.SIGCONT)
    assert state(job.pids[0]) is None
    until(lambda: state(worker) is None, LIMIT)


def state(pid: int) -> str | None:
    """The kernel's letter, None for a process that has ended."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if letter in "ZX" else letter


# ------------------------------------------------------------------------------------------------ the command


def test_trials_have_names_rows_and_words() -> None:
    found = select()
    assert len({each.name for each in found}) == len(found) > 25
    for each in found:
        assert each.rows
        assert set(each.rows) <= set(ROWS_OF_THE_CATALOGUE)
        assert each.play.__doc__
    assert {each.name for each in select(["34"])} == {"flipped-clip"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--only", "earthquake"], "earthquake"), (["--steps", "3"], "--steps"), (["--ranks", "0"], "--ranks")],
)
def test_a_wrong_command_line_is_64(arguments: list[str], word: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", *arguments]) == 64
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert word in said


def test_the_list(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "--list"]) == 0
    out = capfd.readouterr().out
    assert "kill-in-each-phase-of-a-save" in out  # In 80 columns: --only takes the name.
    assert "…" not in out


def tampers(bench: Bench) -> str:
    """A run whose log is not what it computed."""
    bench.complete()
    log = bench.folder / "run" / "log.jsonl"
    lines = log.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"step": 7,' in line and '"train"' in line)
    line = json.loads(lines[place])
    lines[place] = json.dumps({**line, "loss": line["loss"] + 1e-15})
    log.write_text("\n".join(lines) + "\n")
    bench.same_bits()
    return "nothing was noticed"


def dies_too_early(bench: Bench) -> str:
    """A fault that is to strike at a step that never comes."""
    job = bench.start("run", "--stage", "stage1")
    bench.until_step(job, 999)
    return "the fault struck"


def test_a_broken_guarantee_fails_with_its_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = [
        Trial(play.__name__, "a log tells the truth", "a tampered log", (1,), play)
        for play in (tampers, dies_too_early)
    ]
    monkeypatch.setattr("sfa_dist.chaos.all_trials.select", lambda only: broken)
    out = tmp_path / "out"
    assert main(["chaos", "--ranks", "1", "--out", str(out), "--json"]) == 70
    said = capfd.readouterr()
    told = json.loads(said.out)
    assert (told["passed"], told["failed"]) == (0, 2)
    first, second = told["trials"]
    assert "not the same bits, in 1 places; the first: stage1 7: " in first["seen"]
    assert "before the fault could strike" in second["seen"]
    assert "FAIL" in said.err
    evidence = Path(first["evidence"])
    assert evidence.is_relative_to(out)
    assert "stage1 7: " in (evidence / "evidence.txt").read_text()
    assert len([line for line in log_lines(evidence / "run") if line["kind"] == "train"]) == 24
    assert list((evidence / "outputs").rglob("rank-0.err"))


@contextmanager
def command(*arguments: str, temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """`sfa chaos` as a real process with a temporary folder of its own."""
    temporary.mkdir()
    environ = {**os.environ, "TMPDIR": str(temporary)}
    call = [sys.executable, "-m", "sfa_dist.tools.cli", "chaos", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(call, cwd=ROOT, env=environ, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with room in its name for that of a socket; pytest's own has none under xdist."""
    with tempfile.TemporaryDirectory(prefix="sfa-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_temporary_folder_without_room_for_a_socket_is_told(tmp_path: Path) -> None:
    with command("--ranks", "1", "--only", "cut-shard", temporary=tmp_path / ("long" * 20)) as process:
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (64, "")
    assert "set TMPDIR to a shorter one" in err


def workers_in(folder: Path) -> list[str]:
    """Command lines of processes that have their working directory in the folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and str(folder) in os.readlink(process / "cwd"):
                found.append((process / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.mark.fault(33)
def test_a_command_that_ends_leaves_nothing_behind(short_folder: Path) -> None:
    folder = short_folder / "temporary"
    with command("--ranks", "1", "--only", "cut-shard", temporary=folder) as process:
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out + err
    assert err == ""
    assert "2 of 2 hold" in out
    assert "refused by name and offset" in re.sub(r"[│\s]+", " ", out)
    until(lambda: not workers_in(folder), LIMIT)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.chaos)],
    ids=lambda number: number.name,
)
def test_a_command_that_is_ended_takes_its_processes_with_it(short_folder: Path, number: signal.Signals) -> None:
    folder = short_folder / "temporary"
    with command("--ranks", "2", "--only", "suspended", temporary=folder) as process:
        until(lambda: len(workers_in(folder)) >= 2, LIMIT)
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT)
    until(lambda: not workers_in(folder), LIMIT)
    if number == signal.SIGKILL:
        assert process.returncode == -number
        return
    assert process.returncode == 70
    assert err == "stopped: interrupted; all processes of the trials are ended\n"
    assert not list(folder.iterdir())


# ------------------------------------------------------------------------------------------------ the long variant


@pytest.mark.chaos
@pytest.mark.parametrize("engine", ["engine.zero=3", "engine.name=fsdp"])
def test_kills_on_three_ranks_under_other_engines(tmp_path: Path, engine: str) -> None:
    with command(
        *("--ranks", "3", "--rounds", "10", "--set", engine, "--set", "engine.precision=bf16"),
        *("--only", "kill-anywhere", "--only", "stop-request", "--only", "other-"),
        temporary=tmp_path / "temporary",
    ) as process:
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
