"""Whole runs under every launcher: what they leave, log and say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import TRAIN, program, run_command, train
from ranks import free_port
from safetensors import safe_open
from tiny_runs import (
    EVAL_KEYS,
    STAGES,
    START,
    STEPS_PER_EPOCH,
    TRAIN_CLIPS,
    TRAIN_KEYS,
    VAL_CLIPS,
    log_lines,
    losses,
    make_workplace,
    read_json,
    scores,
    sets,
)

from sfa_dist.checkpoint import file_sha256
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.stages.assemble import assemble_stage2

LAUNCHERS = {
    "python": ([sys.executable], 1, 2),
    "torchrun": ([program("torchrun"), "--nproc-per-node", "2", "--master-port", "PORT"], 2, 1),
    "deepspeed": ([program("deepspeed"), "--num_accelerators", "2", "--master_port", "PORT"], 2, 3),
}

STEPS = {"image": STEPS_PER_EPOCH, "stage1": 2 * STEPS_PER_EPOCH, "stage2": 2 * STEPS_PER_EPOCH}


class Launched:
    """A whole run under a launcher: how it ended, and its run directory."""

    def __init__(self, launcher: str, place: Path) -> None:
        words, self.world_size, self.zero = LAUNCHERS[launcher]
        self.launcher, self.place, self.run = launcher, place, place / "runs" / launcher
        own = [*START, f"runs/{launcher}", *sets(f"engine.zero={self.zero}")]
        command = [str(free_port()) if word == "PORT" else word for word in words]
        self.finished = run_command([*command, TRAIN, *own], place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def launch(place: Path) -> Callable[[str], Launched]:
    done: dict[str, Launched] = {}

    def launch(launcher: str) -> Launched:
        if launcher not in done:
            done[launcher] = Launched(launcher, place)
        return done[launcher]

    return launch


@pytest.fixture(params=LAUNCHERS)
def launched(request: pytest.FixtureRequest, launch: Callable[[str], Launched]) -> Launched:
    return launch(request.param)


@pytest.fixture
def alone(launch: Callable[[str], Launched]) -> Launched:
    return launch("python")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dictionary)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


class TestEachLauncher:
    def test_ends_with_0_and_says_the_result(self, launched: Launched) -> None:
        assert launched.finished.code == 0, launched.finished.err
        assert "test: acc1 " in launched.finished.out
        assert "report: " in launched.finished.out
        assert "Traceback" not in launched.finished.err

    def test_every_rank_was_in_it(self, launched: Launched) -> None:
        env = read_json(launched.run / "env.json")
        assert (env["launcher"], env["world_size"]) == (launched.launcher, launched.world_size)
        assert len(env["ranks"]) == launched.world_size
        written = sorted(path.name for path in (launched.run / "stage1" / "checkpoints").glob("*/optimizer-*"))
        assert len(set(written)) == launched.world_size

    def test_leaves_the_run_directory_of_the_contract(self, launched: Launched) -> None:
        names = {path.name for path in launched.run.iterdir()}
        assert names >= {
            *("recipe.yaml", "env.json", "log.jsonl", "console.log", "result.json", "report.html", "report.md"),
            *("figures", *STAGES),
        }
        for stage, steps in STEPS.items():
            assert (launched.run / stage / "weights.safetensors").is_file()
            newest = launched.run / stage / "checkpoints" / f"step-{steps:08d}"
            files = {path.name for path in newest.iterdir()}
            assert {"MANIFEST.json", "model.safetensors", "state.json"} < files
        assert (launched.run / "figures" / "train_loss.png").is_file()
        assert not list(launched.run.rglob("*.tmp"))

    def test_its_recipe_loads_to_the_same_run(self, launched: Launched) -> None:
        recipe = load_recipe(launched.run / "recipe.yaml").recipe
        assert recipe == load_recipe(launched.place / "t.yaml", [f"engine.zero={launched.zero}"]).recipe

    def test_logs_the_keys_of_the_contract(self, launched: Launched) -> None:
        for line in log_lines(launched.run):
            if line["kind"] == "train":
                assert set(line) == TRAIN_KEYS
                assert 0 < line["loss"] < 10
                assert line["grad_norm"] > 0
                assert line["bad_samples"] == 0
            elif line["kind"] == "eval":
                assert set(line) - {"frame_order"} >= EVAL_KEYS
                assert line["samples"] == VAL_CLIPS
            else:
                assert line["kind"] == "event"
                assert line["event"] in ("start", "weights", "checkpoint", "done")

    def test_logs_each_step_once(self, launched: Launched) -> None:
        steps = [(line["stage"], line["step"]) for line in log_lines(launched.run) if line["kind"] == "train"]
        assert steps == [(stage, step) for stage in STAGES for step in range(1, STEPS[stage] + 1)]

    def test_sees_each_clip_once_an_epoch(self, launched: Launched) -> None:
        for line in log_lines(launched.run):
            if line["kind"] == "train":
                assert line["samples_seen"] == line["step"] * TRAIN_CLIPS // STEPS_PER_EPOCH
                assert line["epoch"] == (line["step"] - 1) // STEPS_PER_EPOCH

    def test_evaluates_after_each_epoch_and_tests_over_the_views(self, launched: Launched) -> None:
        lines = [line for line in log_lines(launched.run) if line["kind"] == "eval"]
        assert [(line["stage"], line["step"], line["views"]) for line in lines] == [
            ("image", 3, 1),
            *((stage, step, 1) for stage in ("stage1", "stage2") for step in (3, 6)),
            ("test", 0, 2),
            ("test", 0, 2),
        ]
        assert [line.get("frame_order") for line in lines[-2:]] == [None, "shuffled"]

    def test_result_has_the_keys_of_the_contract(self, launched: Launched) -> None:
        result = read_json(launched.run / "result.json")
        assert {"acc1", "acc5", "total_seconds", "cost_ratio", "acc1_shuffled_frames"} <= result.keys()
        assert list(result["stages"]) == list(STAGES)
        for stage in result["stages"].values():
            assert {"steps", "seconds", "gpu_seconds", "peak_memory_gib"} <= stage.keys()
            assert stage["gpu_seconds"] == pytest.approx(launched.world_size * stage["seconds"])
        last = result["stages"]["stage2"]
        for key in ("trainable_parameters", "frozen_parameters", "optimizer_bytes_per_rank"):
            assert result[key] == last[key]
        assert result["total_seconds"] == pytest.approx(sum(s["seconds"] for s in result["stages"].values()))
        assert result["samples"] == VAL_CLIPS
        assert result["views"] == 2

    def test_counts_its_parameters(self, launched: Launched) -> None:
        stages = read_json(launched.run / "result.json")["stages"]
        for name in STAGES:
            weights = tensors(launched.run / name / "weights.safetensors")
            assert stages[name]["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
        stage1 = tensors(launched.run / "stage1" / "weights.safetensors")
        trunk = sum(tensor.numel() for key, tensor in stage1.items() if key.startswith("trunk."))
        assert stages["stage2"]["frozen_parameters"] == trunk
        assert stages["stage1"]["frozen_parameters"] == 0

    def test_an_optimizer_holds_its_share_of_the_trainable_parameters(self, launched: Launched) -> None:
        """SGD with momentum: 8 bytes a parameter, over all ranks; never more for the frozen ones."""
        last = read_json(launched.run / "result.json")["stages"]["stage2"]
        share = 8 * last["trainable_parameters"] / launched.world_size
        assert last["optimizer_bytes_per_rank"] == pytest.approx(share, rel=0.1)

    def test_stage_2_stores_no_trunk_but_its_hash(self, launched: Launched) -> None:
        """Invariant 1."""
        recipe = load_recipe(launched.run / "recipe.yaml").recipe
        assert recipe.stage2 is not None
        parts = assemble_stage2(recipe.stage2, launched.run / "stage1" / "weights.safetensors", classes="")
        assert parts.frozen is not None
        trunk = parts.frozen.sha256()
        weights = launched.run / "stage2" / "weights.safetensors"
        assert metadata(weights)["trunk_sha256"] == trunk  # after training; the checkpoints' is from before
        assert all(key.startswith("tail.") for key in tensors(weights))
        tail = {key.removeprefix("tail.") for key in tensors(weights)}
        checkpoints = list((launched.run / "stage2" / "checkpoints").iterdir())
        assert checkpoints
        for checkpoint in checkpoints:
            assert read_json(checkpoint / "state.json")["trunk_sha256"] == trunk
            assert tensors(checkpoint / "model.safetensors").keys() == tail
            for file in checkpoint.glob("optimizer-*"):
                assert {key.rsplit("/", 2)[0] for key in tensors(file)} <= tail

    def test_report_shows_all_stages(self, launched: Launched) -> None:
        page = (launched.run / "report.html").read_text()
        for stage in STAGES:
            assert f'<th scope="row">{stage}</th>' in page
            assert f">Curves of {stage}</h2>" in page
        assert 1 <= page.count("data:image/jpeg;base64,") <= 9, "pictures of tested clips"

    def test_gives_the_numbers_of_one_process(self, launched: Launched, alone: Launched) -> None:
        """Invariants 3 and 5, in fp32: ZeRO-1 on two ranks = ZeRO-3 on two ranks = ZeRO-2 on one."""
        one, other = losses(alone.run), losses(launched.run)
        assert one.keys() == other.keys()
        for key, (loss, norm) in one.items():
            assert other[key] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3)), key
        for mine, theirs in zip(scores(alone.run), scores(launched.run), strict=True):
            assert theirs[:4] == mine[:4]
            assert theirs[4] == pytest.approx(mine[4], rel=1e-4)

    def test_started_again_skips_every_stage(self, launched: Launched) -> None:
        files = [launched.run / stage / "weights.safetensors" for stage in STAGES]
        before = [(file.stat().st_mtime_ns, file_sha256(file)) for file in files]
        result = read_json(launched.run / "result.json")
        lines = len(log_lines(launched.run))
        own = [*START, f"runs/{launched.launcher}", *sets(f"engine.zero={launched.zero}")]
        again = train(launched.place, *own)
        assert again.code == 0, again.err
        assert all(f"{stage}: done before, skipped" in again.out for stage in STAGES)
        assert [(file.stat().st_mtime_ns, file_sha256(file)) for file in files] == before
        assert "finished: the test was done before" in again.out
        assert log_lines(launched.run)[lines:] == []
        assert read_json(launched.run / "result.json") == result


def test_a_forked_run_is_a_real_one(place: Path, alone: Launched) -> None:
    """Most tests start runs that way."""
    finished = train(place, *START, "forked")
    assert finished.code == 0, finished.err
    assert losses(place / "forked") == losses(alone.run)
