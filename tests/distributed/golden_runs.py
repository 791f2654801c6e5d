"""The runs whose losses are recorded in tests/golden/losses.tsv: what they are, how they run, and the file's format.

`demo` is recipes/demo.yaml, 30 steps of each stage. It is smaller in two ways, so that it takes seconds: batches of 16
in micro-batches of 8, and 128 clips a stage, which are 8 steps an epoch. `schedule.max_steps` ends a stage early and
does not change its curve. TOYS are the recipe of tiny_runs.py, both stages on two ranks, under each engine. WRITTEN
go on from what sfa_dist 0.3.0 wrote, tests/data/v0_3. `demo` and WRITTEN run on one rank, where ZERO_2 keeps the engine
that they were recorded with.

All give the same bits again with the same CPU and versions, and that is asked for there. Elsewhere additions have
another order. TOLERANCES is about four times the largest deviation, of loss and of gradient norm, of recordings with
AVX2 and with the plain kernels of ATen, oneDNN and MKL (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA,
MKL_ENABLE_INSTRUCTIONS) from the one with AVX-512.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import av
import pytest
import torch
from commands import ROOT, run_command, train_ranks
from tiny_runs import SHORT, START, losses, make_workplace, sets

GOLDEN = ROOT / "tests" / "golden" / "losses.tsv"
COMMAND = "python tests/golden/record.py"
COLUMNS = ("run", "stage", "step", "loss", "grad_norm")
DEMO, DEMO_STEPS = "demo", 30
DEMO_STAGES = ("image", "stage1", "stage2")
DEMO_DATA = ("--train-clips", "128", "--test-clips", "16", "--image-clips", "128")
DEMO_SETS = (
    *("batch.size=16", "batch.micro=8", "test.shuffled_frames=false", "log.every=1", "log.wandb=off"),
    *(f"data.{key}=[0.5, 0.5, 0.5]" for key in ("mean", "std")),  # As the recipe was when it was recorded.
    "stage2.chunk_frames=16",
    *(f"{stage}.schedule.max_steps={DEMO_STEPS}" for stage in DEMO_STAGES),
)
TOYS = {
    **{f"zero{number}": (f"engine.zero={number}",) for number in range(4)},
    "fsdp": ("engine.name=fsdp",),
    "tree": ("engine.reduction=tree",),
    "zero2-bf16": ("engine.zero=2", "engine.precision=bf16"),
    "fsdp-bf16": ("engine.name=fsdp", "engine.precision=bf16"),
}
V0_3 = ROOT / "tests" / "data" / "v0_3"
ZERO_2 = "deepspeed={zero_optimization: {stage: 2}}"
STOPPED, CACHED = "stopped", "cached"
WRITTEN = {STOPPED: "t.yaml", CACHED: "c.yaml"}  # Run directory and its recipe.
RUNS = (DEMO, *TOYS, *WRITTEN)

Key = tuple[str, str, int]  # run, stage, step
Values = tuple[float, float]  # loss, gradient norm

# Relative; what is not named is bound by OTHERWISE.
OTHERWISE = (1e-5, 1e-5)
TOLERANCES: dict[tuple[str, str], Values] = {
    (DEMO, "stage1"): (3e-5, 4e-4),
    (DEMO, "stage2"): (3e-4, 6e-3),
    **{(toy, stage): (3e-3, 5e-2) for toy in TOYS if "bf16" in toy for stage in ("stage1", "stage2")},
}


def stopped_run_goes_on(folder: Path) -> dict[Key, Values]:
    """STOPPED as its user starts it again, on one rank and without ZERO_2; what it logged at each step."""
    return {(STOPPED, *key): values for key, values in losses(_written(STOPPED, folder)).items()}


def golden_run(name: str, folder: Path) -> dict[Key, Values]:
    """Runs one of RUNS in the folder; what it logged at each step."""
    how = _demo if name == DEMO else _toy if name in TOYS else partial(_written, keep=(ZERO_2,))
    return {(name, *key): values for key, values in losses(how(name, folder)).items()}


def refused_here(name: str) -> str | None:
    """Why the run cannot be on this machine: a cache belongs to the torch and PyAV that it was made with."""
    if name != CACHED:
        return None
    key = json.loads((V0_3 / CACHED / "cache" / "train" / "view-00" / "manifest.json").read_text())["key"]
    made, here = (key["torch"], key["decoder"]), (torch.__version__, f"PyAV {av.__version__}")
    return None if made == here else f"the cache of 0.3 was made with {made}, here is {here}"


def assert_golden(found: Mapping[Key, Values], *, to_the_bit: bool = True) -> None:
    """What `golden_run` gave is what is recorded: bit by bit with the CPU and versions of the record, else, and where
    `to_the_bit` is not asked for, within TOLERANCES."""
    runs = {run for run, _, _ in found}
    golden = {key: values for key, values in read_golden().items() if key[0] in runs}
    assert list(found) == list(golden)
    if to_the_bit and _recorded_with() == _header(GOLDEN):
        assert found == golden
        return
    for (run, stage, step), values in golden.items():
        tolerances = TOLERANCES.get((run, stage), OTHERWISE)
        for value, other, tolerance in zip(values, found[run, stage, step], tolerances, strict=True):
            assert other == pytest.approx(value, rel=tolerance), (run, stage, step)


def _demo(name: str, folder: Path) -> Path:
    made = run_command(
        [sys.executable, "-m", "sfa_dist.tools.demo_data", "--out", str(folder / "digits"), *DEMO_DATA], ROOT
    )
    assert made.code == 0, made.err
    recipe = str(ROOT / "recipes" / "demo.yaml")
    return _run(folder, name, 1, "--recipe", recipe, *sets(*DEMO_SETS, ZERO_2), SFA_DEMO_DATA="digits")


def _toy(name: str, folder: Path) -> Path:
    if not (folder / "t.yaml").exists():
        make_workplace(folder, SHORT)
    return _run(folder, name, 2, *START[:2], *sets(*TOYS[name]))


def _written(name: str, folder: Path, keep: tuple[str, ...] = ()) -> Path:
    place = folder / "v0_3"
    if not place.exists():
        shutil.copytree(V0_3, place)
    return _run(place, name, 1, "--recipe", WRITTEN[name], *sets(*keep))


def _run(folder: Path, name: str, ranks: int, *arguments: str, **environ: str) -> Path:
    for process in train_ranks(ranks, folder, *arguments, "--run-dir", name, **environ):
        finished = process.wait()
        assert finished.code == 0, finished.err
    return folder / name


def write_golden(path: Path, values: Mapping[Key, Values]) -> None:
    """Tab-separated lines under a header of `#` lines, which name what they were recorded with."""
    header = [f"# {name}: {value}" for name, value in _recorded_with().items()]
    lines = ["\t".join((*map(str, key), *map(repr, pair))) for key, pair in values.items()]
    path.write_text("\n".join([*header, "\t".join(COLUMNS), *lines, ""]))


def read_golden(path: Path = GOLDEN) -> dict[Key, Values]:
    """What `write_golden` wrote."""
    lines = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    assert tuple(lines[0]) == COLUMNS, lines[0]
    return {(run, stage, int(step)): (float(loss), float(norm)) for run, stage, step, loss, norm in lines[1:]}


def _header(path: Path) -> dict[str, str]:
    lines = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    return dict(line.split(": ", 1) for line in lines)


def _recorded_with() -> dict[str, str]:
    cpu = _cpu()
    kind = ", ".join(f"{name} {cpu.get(name, 'unknown')}" for name in ("cpu family", "model", "stepping"))
    flags = hashlib.sha256(cpu.get("flags", "").encode()).hexdigest()[:8]
    return {
        "command": COMMAND,
        "machine": f"{platform.machine()}, {cpu.get('model name', 'unknown')}, {kind}, flags (sha256) {flags}",
        "kernels": f"{torch.backends.cpu.get_cpu_capability()}, one thread a rank; fp32 but for the runs named bf16",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, PyAV {av.__version__}",
    }


def _cpu() -> dict[str, str]:
    """What Linux says of the first core."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines())
    return {name.strip(): value.strip() for name, value in pairs}
