"""What a run writes down about itself: what each stage was made from, on what machines, and what came out."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import sfa_dist
from sfa_dist.boundary.counted import counted
from sfa_dist.boundary.disk import explain, read_object, warn_unwritten, write_if_new, write_json
from sfa_dist.boundary.file_names import DONE, ENVIRONMENT, RECIPE
from sfa_dist.boundary.secret import without_secrets_in
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.blocks.model import POSITION_STD
from sfa_dist.recipe.schema import Recipe, StageBlock, record_recipe
from sfa_dist.recipe.stage_names import REPORT, RUN_STEPS, TEST
from sfa_dist.recipe.stages import FREE_KEYS

DIVERGED = "diverged"  # Key of a result, and event: a member of a sweep that has left the finite numbers.
RESULT_NUMBERS = (
    *("steps", "seconds", "gpu_seconds", "peak_memory_gib", "trainable_parameters", "frozen_parameters"),
    "optimizer_bytes_per_rank",
)
HUGE = 10**18  # No number of a result is as large.
# What a model is where its run directory does not tell, since there was no choice yet.
OFFICIAL_MODEL: dict[str, Any] = {
    "model.gelu": "tanh",
    "model.norm_eps": 1e-6,
    "model.position_std": POSITION_STD,
    "model.positions": "learned",
    "model.subtract": "none",
    "model.centre": False,
}
RECORDED_PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "webdataset",
    "av",
    "torchcodec",
    "safetensors",
    "numpy",
)


def stage_inputs(recipe: Recipe, stage: StageBlock, index_sha256: str, source_sha256: str) -> dict[str, Any]:
    """What a stage's result depends on, flat: recipe keys by dotted name, the clips' hash, the starting weights'
    hash."""
    flat = {
        key: value
        for key, value in flatten(stage.model_dump(mode="json")).items()
        if not any(key == skipped or key.startswith(skipped + ".") for skipped in FREE_KEYS)
    }
    if flat.get("trunk_precision") == "auto":  # As in run directories of before there was a choice.
        del flat["trunk_precision"]
    if flat.get("data.decode_device") == "cpu":  # The same.
        del flat["data.decode_device"]
    for key, official in OFFICIAL_MODEL.items():  # The same; null is the official one.
        if flat.get(key) in (None, official):
            flat.pop(key, None)
    if flat.get("augment.resize") == "official":  # The same.
        del flat["augment.resize"]
    own_seed = flat.pop("seed", None)  # Of stage 2's tail; the run's seed stands beside it.
    inputs = {
        **flat,
        **({"seed of the tail": own_seed} if own_seed is not None else {}),
        "seed": recipe.seed,
        "train clips (sha256)": index_sha256,
        "starting weights (sha256)": source_sha256,
    }
    masked: dict[str, Any] = without_secrets_in(inputs)
    return masked


def refuse_other_inputs(name: str, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises RecipeError that names each field in which the run directory and the recipe disagree."""
    recorded = without_secrets_in(recorded)  # Which a directory of before may hold: a new signature is no other recipe.
    keys = sorted((recorded.keys() | wanted.keys()) - FREE_KEYS)  # of which older runs recorded more
    different = [key for key in keys if recorded.get(key) != wanted.get(key)]
    if different:
        shown = "; ".join(f"{key}: was {recorded.get(key)!r}, now {wanted.get(key)!r}" for key in different[:5])
        raise RecipeError(
            f"the run directory holds {name} of another recipe ({shown}); "
            f"use another --run-dir, or remove its {name} folder"
        )


def flatten(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to one with dotted keys; lists stay values."""
    out: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def read_done(directory: Path, numbers: Sequence[str] = RESULT_NUMBERS) -> dict[str, Any] | None:
    """A stage's `done.json`, None when the stage is not done; `numbers` are what its result has to tell.

    Raises CheckpointError when it cannot be read, or does not tell what it should.
    """
    file = directory / DONE
    try:
        done = read_object(file, inputs=dict, result=dict)
        for key in ("steps",) if DIVERGED in done["result"] else numbers:
            value = done["result"].get(key)
            if type(value) not in (int, float) or not 0 <= value < HUGE:
                raise ValueError(f"its result has {key} {value!r:.40}")
        return done
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        told = explain(error, file)
        raise CheckpointError(f"{file} cannot be read ({told}); remove it to run the stage again") from error


def write_done(
    directory: Path, inputs: dict[str, Any], result: dict[str, Any], files: dict[str, dict[str, Any]] | None = None
) -> None:
    """`done.json`, with size and sha256 of the stage's `files` by name, which whoever reads them checks
    (models/weights_file.py). Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / DONE, {"inputs": inputs, "result": result, "files": files or {}})


def keep_recipe(directory: Path, recipe: Recipe) -> None:
    """`recipe.yaml` of a run directory. Raises OSError, and leaves one that stands as it is then."""
    write_if_new(directory / RECIPE, record_recipe(recipe))


def try_to_keep(path: Path, keep: Callable[[], object]) -> None:
    """`keep()`, which writes `path`, a record that no run depends on: a disk that refuses is told, and the run goes
    on to whatever end it has."""
    try:
        keep()
    except OSError as error:
        warn_unwritten(path, error)


def collect_results(run_dir: Path) -> dict[str, Any]:
    """The stages' own results and the totals of result.json."""
    stages = {
        name: done["result"]
        for name in RUN_STEPS
        if name not in (TEST, REPORT) and (done := read_done(run_dir / name)) is not None
    }
    last = list(stages.values())[-1] if stages else {}
    totals = {key: last.get(key) for key in ("trainable_parameters", "frozen_parameters", "optimizer_bytes_per_rank")}
    seconds = sum(stage["seconds"] for stage in stages.values())
    # Known only where the end-to-end baseline ran beside it.
    return {"stages": stages, "total_seconds": seconds, **totals, "cost_ratio": None}


def environment_record(runtime: Runtime, decoder: str) -> dict[str, Any]:
    """env.json: versions, commit, hosts and devices. Collective."""
    device = (
        torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else platform.processor() or "cpu"
    )
    places = runtime.gather({"host": runtime.host, "device": device})
    versions: dict[str, str | None] = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "sfa_dist": sfa_dist.__version__,
        "commit": _git_commit(),
        "code_sha256": code_sha256(),
        "python": platform.python_version(),
        "versions": versions,
        "decoder": decoder,
        "launcher": runtime.launch.launcher,
        "world_size": runtime.world_size,
        "ranks": places,
    }


def recorded_decoder(run_dir: Path) -> str | None:
    """What decoded the clips of a run until now, by its env.json; None where that does not tell."""
    try:
        return str(read_object(run_dir / ENVIRONMENT, decoder=str)["decoder"])
    except (OSError, ValueError):  # It is written anew at each start, and nothing depends on it.
        return None


@functools.cache
def code_sha256() -> str:
    """sha256 over the names and bytes of the package's Python files, as they are when it is first asked for."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        out = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # Not a git checkout, or no git: the version stands beside it.
    return out.stdout.strip()


def setup_table(
    name: str,
    stage: StageBlock,
    parameters: tuple[int, int],
    clips: tuple[int, int],
    steps: tuple[int, int],
    world_size: int,
    optimizer_bytes: int,
) -> Table:
    """The start-up table. `clips` are (train, val), `steps` (per epoch, accumulation)."""
    trainable, frozen = parameters
    table = Table(title=f"stage {name}", show_header=False)
    accumulated, ranks = steps[1] * world_size * stage.batch.micro, counted(world_size, "rank")
    padded = (
        "" if accumulated == stage.batch.size else f", {accumulated - stage.batch.size} slots of each step stay empty"
    )
    rows = [
        ("parameters", f"{trainable + frozen:,} = {trainable:,} trainable + {frozen:,} frozen"),
        (
            "optimizer state",
            f"{optimizer_bytes / 2**20:,.1f} MiB per rank ({stage.optimizer.name}, {stage.engine.title})",
        ),
        ("precision", stage.engine.precision),
        ("clips", f"{clips[0]:,} train, {clips[1]:,} val; {stage.frames} frames, stride {stage.data.stride}"),
        ("steps", f"{steps[0]:,} per epoch x {counted(stage.schedule.epochs, 'epoch')}"),
        (
            "global batch",
            f"{stage.batch.size} = {ranks} x {stage.batch.micro} x {steps[1]} accumulated{padded}",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def index_size(index: SampleIndex | None) -> int:
    """Samples of an index, 0 where there is none."""
    return 0 if index is None else len(index)
