"""benchmarks/gpu.sh: its code path on a CPU with tiny models. What it measures needs a GPU; that it runs does not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sfa_dist.parallel.environment import environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TRIED = ("memory_h", "plan_probe")


@pytest.fixture
def gpu_parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as the script sees it: its folder is on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_parts")


def run_script(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {"OUT": str(out), "PYTHON": sys.executable}
    command = [str(BENCHMARKS / "gpu.sh"), "--device", "cpu", "--tiny", *arguments]
    return subprocess.run(command, env={**environment(), **own}, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_parts_run_are_merged_and_are_not_run_again(tmp_path: Path) -> None:
    first = run_script(tmp_path, "--only", *TRIED)
    assert first.returncode == 0, first.stdout + first.stderr
    done = json.loads((tmp_path / "results.json").read_text())
    assert set(done) == set(TRIED)
    assert done["memory_h"]["machine"]["gpu"] is None
    assert [row[1] for row in done["memory_h"]["rows"]] == ["pooled", "pooled", "tokens", "tokens"]
    text = (tmp_path / "results.md").read_text()
    assert all(f"## {part}" in text for part in TRIED)
    (tmp_path / "plan_probe.json").unlink()
    again = run_script(tmp_path, "--only", *TRIED)
    assert "memory_h: done before" in again.stdout
    assert "plan_probe: done in" in again.stdout


def test_what_is_not_finished_is_told_and_is_not_a_result(tmp_path: Path) -> None:
    late = run_script(tmp_path, "--only", "step_b", "--budget", "0.5")
    assert late.returncode == 70
    assert "step_b: not done in 0 s; see" in late.stdout
    assert json.loads((tmp_path / "results.json").read_text()) == {}


def test_a_part_that_is_stopped_keeps_its_rows_and_is_run_again(tmp_path: Path, gpu_parts: ModuleType) -> None:
    slow = """
import argparse, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from common import report
arguments = argparse.Namespace(json=pathlib.Path(sys.argv[3]))
report(arguments, "two sizes", ["size", "ms"], [["B", 1.5]], whole=False)
time.sleep(60)
"""
    part = gpu_parts.Part("slow", 10, ["-c", slow, str(BENCHMARKS)])
    wrong = gpu_parts.run(part, tmp_path, environment(), 10)
    assert wrong == f"not done in 10 s, 1 rows are kept; see {tmp_path / 'slow.log'}"
    assert not gpu_parts.is_whole(tmp_path / "slow.json")
    gpu_parts.merge(tmp_path, ["slow"])
    assert "two sizes (stopped before its end)" in (tmp_path / "results.md").read_text()


def test_the_tests_that_need_a_gpu_are_named(gpu_parts: ModuleType) -> None:
    files = gpu_parts.gpu_test_files()
    assert {Path(file).name for file in files} >= {"test_trunk_ahead.py", "test_plan_real.py", "test_decode_card.py"}


def test_a_part_that_fails_leaves_its_log_and_no_result(tmp_path: Path, gpu_parts: ModuleType) -> None:
    part = gpu_parts.Part("bad", 30, ["-c", "print('no such card'); raise SystemExit(3)"])
    wrong = gpu_parts.run(part, tmp_path, environment(), 30)
    assert wrong == f"ended with 3; see {tmp_path / 'bad.log'}"
    assert "no such card" in (tmp_path / "bad.log").read_text()
    with pytest.raises(ValueError, match="pytest ended with 1"):
        gpu_parts.read_tests(1, "1 failed")


def test_the_parts_fit_into_nine_minutes_and_are_there(gpu_parts: ModuleType) -> None:
    parts = gpu_parts.parts(tiny=False)
    assert sum(part.seconds for part in parts) <= 540
    programs = [Path(part.program[0]) for part in parts if part.program[0] != "-m"]
    assert all(program.is_file() for program in programs)
    assert [part.name for part in parts] == [part.name for part in gpu_parts.parts(tiny=True)]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [str(BENCHMARKS / "gpu.sh")]
    own = {"OUT": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env={**environment(), **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 78
    assert done.stderr.startswith("error: no GPU here")
