"""`sfa chaos`: each injector does what it says, the judge is not blind, and the command tells, cleans up and ends."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import webdataset as wds

from sfa_dist.chaos import injectors
from sfa_dist.chaos.all_trials import select
from sfa_dist.chaos.bench import Bench, References
from sfa_dist.chaos.builtin import noisy_samples, write_builtin
from sfa_dist.chaos.oracle import compare, compare_closely, log_lines
from sfa_dist.chaos.trials import Options, Trial, play_all
from sfa_dist.chaos.workplace import Workplace, make_workplace, write_shards
from sfa_dist.data.bad_sample import BadSample
from sfa_dist.data.reader import read_clip_bytes
from sfa_dist.data.shard_index import load_index, verify_index
from sfa_dist.data.shards import expand_shards
from sfa_dist.errors import DataError, RecipeError
from sfa_dist.recipe import load_recipe
from sfa_dist.tools.cli import main

ROOT = Path(__file__).resolve().parents[2]
KILLS = 5
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


# ------------------------------------------------------------------------------------------------ injectors


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path / "shards", noisy_samples(7, seed=3))


@pytest.fixture
def chance() -> random.Random:
    return random.Random(5)


def test_cut_flipped_deleted_swapped_files(tmp_path: Path, chance: random.Random) -> None:
    before = {
        name: bytes(range(start, 200)) for name, start in (("cut", 0), ("flip", 1), ("gone", 2), ("one", 3), ("two", 4))
    }
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    injectors.truncate(tmp_path / "cut", chance)
    cut = (tmp_path / "cut").read_bytes()
    assert 0 < len(cut) < len(before["cut"])
    assert before["cut"].startswith(cut)
    injectors.flip_bit(tmp_path / "flip", chance)
    pairs = zip((tmp_path / "flip").read_bytes(), before["flip"], strict=True)
    assert [(a ^ b).bit_count() for a, b in pairs if a != b] == [1]
    injectors.delete(tmp_path / "gone", chance)
    assert not (tmp_path / "gone").exists()
    injectors.swap(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == before["two"]
    assert (tmp_path / "two").read_bytes() == before["one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "flip", "one", "two"]


def test_the_hostile_pickle_is_one(tmp_path: Path) -> None:
    """Whoever loads it is harmed, or its refusal would prove nothing."""
    payload = injectors.pickle_that_touches(tmp_path / "canary")
    assert not (tmp_path / "canary").exists()
    pickle.loads(payload)
    assert (tmp_path / "canary").exists()


def test_hostile_members_harm_a_reader_that_decodes_by_suffix(shards: list[Path], tmp_path: Path) -> None:
    injectors.add_hostile_members(shards[0], tmp_path / "canary")
    with tarfile.open(shards[0]) as archive:
        assert sum(member.name.endswith((".pyd", ".pkl", ".pickle", ".pth")) for member in archive) == 4
    # `pkl` alone, as a stock reader would meet it first.
    stock = wds.WebDataset(str(shards[0]), shardshuffle=False, handler=wds.ignore_and_continue)
    for _ in stock.decode(handler=wds.ignore_and_continue):
        pass
    assert (tmp_path / "canary").exists()


def test_a_damaged_clip_is_that_clip_alone(shards: list[Path], chance: random.Random) -> None:
    name = injectors.damage_clip(shards[1], chance)
    index = load_index(shards)
    bad = []
    for sample in range(len(index)):
        try:
            read_clip_bytes(index, sample)
        except BadSample:
            bad.append(index.name(sample))
    assert bad == [name]
    assert len(verify_index(shards)) == 1


def test_all_clips_damaged(shards: list[Path], chance: random.Random) -> None:
    assert sum(injectors.damage_all_clips(shard, chance) for shard in shards) == 7
    index = load_index(shards)
    for sample in range(len(index)):
        with pytest.raises(BadSample, match="crc32"):
            read_clip_bytes(index, sample)


def test_a_replaced_shard_is_a_good_one(shards: list[Path]) -> None:
    before = load_index(shards)
    injectors.drop_last_sample(shards[0])
    with pytest.raises(DataError, match="cut or replaced"):
        load_index(shards)
    injectors.forget_index(shards[0].parent)
    after = load_index(shards)
    assert len(after) == len(before) - 1
    assert after.sha256 != before.sha256
    assert not after.errors


def fill(folder: str, said: str) -> None:
    try:
        (Path(folder) / "file").write_bytes(bytes(1_000_000))
    except OSError as error:
        Path(said).write_text(errno.errorcode[error.errno or 0])


@pytest.mark.skipif(not injectors.can_mount(), reason="no mounts of one's own here")
def test_a_small_disk_is_full_for_its_process_alone(tmp_path: Path) -> None:
    disk, kept, said = tmp_path / "disk", tmp_path / "kept", tmp_path / "said"
    disk.mkdir()
    if (child := os.fork()) == 0:
        try:
            at_end = injectors.small_disk(disk, 100_000, kept)()
            fill(str(disk), str(said))
            assert at_end is not None
            at_end()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert said.read_text() == "ENOSPC"
    assert 0 < (kept / "file").stat().st_size < 1_000_000
    assert not list(disk.iterdir())


def test_signals_reach_whom_they_should(references: References, tmp_path: Path) -> None:
    """A rank alone, a rank with its workers, and nothing of a job is left when the bench closes."""
    with Bench(references, tmp_path / "bench", 1, random.Random(0)).closing() as bench:
        job = bench.start(sets=("data.workers=1",))
        bench.until_step(job, 1)
        job.send(signal.SIGSTOP)
        [worker, *_] = job.workers(0)
        job.send(signal.SIGCONT)
        job.send_to_groups(signal.SIGSTOP)
        wait_for(lambda: {state(job.pids[0]), state(worker)} == {"T"})
        job.send(signal.SIGCONT)
        wait_for(lambda: state(job.pids[0]) not in ("T", None))
        assert state(worker) == "T"
        job.send_to_groups(signal.SIGCONT)
    assert state(job.pids[0]) is None
    wait_for(lambda: state(worker) is None)


def state(pid: int) -> str | None:
    """The kernel's letter, None for a process that has ended."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if letter in "ZX" else letter


def wait_for(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ the judge


def write_log(run: Path, *steps: tuple[int, float], more: str = "") -> Path:
    run.mkdir()
    (run / "stage1").mkdir()
    (run / "stage1" / "weights.safetensors").write_bytes(b"weights")
    lines = [{"kind": "train", "stage": "stage1", "step": step, "loss": loss, "grad_norm": 1.0} for step, loss in steps]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
    return run


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_log(tmp_path / "reference", (1, 0.5), (2, 0.25))


def test_the_same_run_has_no_difference(tmp_path: Path, reference: Path) -> None:
    run = write_log(tmp_path / "run", (1, 0.5), (2, 0.25), (2, 0.25), more='{"kind": "train", "sta')
    assert compare(run, reference) == []


def test_the_last_bit_of_a_loss_counts(tmp_path: Path, reference: Path) -> None:
    run = write_log(tmp_path / "run", (1, 0.5), (2, 0.25000000000000006))
    [line] = compare(run, reference)
    assert line.startswith("stage1 2: ")
    assert "0.25000000000000006" in line


def test_a_missing_step_and_other_weights_count(tmp_path: Path, reference: Path) -> None:
    run = write_log(tmp_path / "run", (1, 0.5))
    (run / "stage1" / "weights.safetensors").write_bytes(b"other")
    lines = compare(run, reference)
    assert ["missing" in lines[0], lines[1].startswith("weights of stage1")] == [True, True]


def test_a_step_that_contradicts_itself_counts(tmp_path: Path, reference: Path) -> None:
    run = write_log(tmp_path / "run", (1, 0.5), (2, 0.25), (2, 0.26))
    [line] = compare(run, reference)
    assert "when it was run again" in line


def test_an_empty_reference_proves_nothing(tmp_path: Path) -> None:
    empty = [tmp_path / "one", tmp_path / "other"]
    for folder in empty:
        folder.mkdir()
    assert "holds no finished stage" in compare(*empty)[0]


def test_closeness_is_tight_where_the_run_went_on(tmp_path: Path, reference: Path) -> None:
    resumed = json.dumps({"kind": "event", "event": "resume", "stage": "stage1", "step": 1}) + "\n"
    run = write_log(tmp_path / "run", (1, 0.5001), (2, 0.2501), more=resumed)
    assert compare_closely(run, reference, first=1e-2, later=1e-2)[0] == []
    [line] = compare_closely(run, reference, first=1e-5, later=1e-2)[0]
    assert line.startswith("stage1 2: ")
    assert compare_closely(reference, reference, 1.0, 1.0)[0] == ["the run was never resumed"]
    nothing = write_log(tmp_path / "nothing", (1, 0.5), more=resumed)
    assert "stage1 2: loss nan" in compare_closely(nothing, reference, 1.0, 1.0)[0][0]


# ------------------------------------------------------------------------------------------------ the workplace


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_users_shards_are_only_read(tmp_path: Path) -> None:
    """No index is written beside them, and their clips are in the trials' shards byte for byte."""
    recipe = write_builtin(tmp_path / "mine")
    for folder in ("train", "val"):
        injectors.forget_index(tmp_path / "mine" / folder)
    before = snapshot(tmp_path / "mine")
    place = make_workplace(tmp_path / "place", load_recipe(recipe), "mine", 12, False)
    assert snapshot(tmp_path / "mine") == before
    assert place.real_shards == []
    copied = load_index(expand_shards(place.recipe.stage1.data.train))
    theirs = load_index(expand_shards([str(tmp_path / "mine" / "train" / "*.tar")]))
    assert sorted(copied.crc32) == sorted(theirs.crc32)
    assert any("copied from 3 of 3 shards" in note for note in place.notes)


def test_what_is_set_stays(tmp_path: Path) -> None:
    recipe = write_builtin(tmp_path / "mine")
    loaded = load_recipe(recipe, ["batch.size=6", "checkpoint.keep=5"])
    place = make_workplace(tmp_path / "place", loaded, "mine", 13, False)
    for stage in place.stages.values():
        assert (stage.batch.size, stage.batch.micro, stage.checkpoint.keep) == (6, 2, 5)
        assert stage.checkpoint.every_steps == 2
        assert stage.schedule.max_steps == 13
    assert (place.recipe.log.every, place.recipe.log.wandb) == (1, "off")


@pytest.mark.parametrize("name", ["h_96f", "g_48f", "b_32f"])
def test_a_large_recipe_is_refused_and_told_the_way_out(tmp_path: Path, name: str) -> None:
    loaded = load_recipe(ROOT / "recipes" / f"{name}.yaml", environ={"SFA_DATA": str(tmp_path)})
    with pytest.raises(RecipeError, match=r"too large for a CPU.*--tiny-model"):
        make_workplace(tmp_path / "place", loaded, name, 12, False)


def test_a_large_recipe_with_a_tiny_model(tmp_path: Path) -> None:
    write_builtin(tmp_path / "mine")
    shards = f"['{tmp_path}/mine/train/*.tar']"
    overrides = [f"data.{split}={shards}" for split in ("train", "val", "test")]
    loaded = load_recipe(ROOT / "recipes" / "h_96f.yaml", overrides, {"SFA_DATA": str(tmp_path)})
    place = make_workplace(tmp_path / "place", loaded, "h_96f", 12, True)
    stage1, stage2 = place.stages["stage1"], place.stages["stage2"]
    assert (stage1.model.width, stage2.model.width, stage2.frames) == (24, 24, 96)
    assert stage1.model.classes == stage2.model.classes == 400
    assert any("tiny model" in note for note in place.notes)


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
    out = re.sub(r"\s", "", capfd.readouterr().out)
    assert "kill-anywhere" in out


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
    wait_for(lambda: not workers_in(folder))
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.chaos)],
    ids=lambda number: number.name,
)
def test_a_command_that_is_ended_takes_its_processes_with_it(short_folder: Path, number: signal.Signals) -> None:
    folder = short_folder / "temporary"
    with command("--ranks", "2", "--only", "suspended", temporary=folder) as process:
        wait_for(lambda: len(workers_in(folder)) >= 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT)
    wait_for(lambda: not workers_in(folder))
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
