"""What a run records about itself: the inputs of each stage, the machines it ran on, and the results."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import sfa_dist
from sfa_dist.boundary.counted import counted
from sfa_dist.boundary.disk import explain, read_object, warn_unwritten, write_if_new, write_json
from sfa_dist.boundary.file_names import DONE, ENVIRONMENT, RECIPE
from sfa_dist.boundary.secret import without_secrets, without_secrets_in
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.blocks import EngineBlock
from sfa_dist.recipe.blocks.model import POSITION_STD
from sfa_dist.recipe.schema import Recipe, StageBlock, record_recipe
from sfa_dist.recipe.stage_names import REPORT, RUN_STEPS, TEST
from sfa_dist.recipe.stages import FREE_KEYS

DIVERGED = "diverged"  # A key of a result, and an event: a member of a sweep whose loss is no longer finite.
RESULT_NUMBERS = (
    *("steps", "seconds", "gpu_seconds", "peak_memory_gib", "trainable_parameters", "frozen_parameters"),
    "optimizer_bytes_per_rank",
)
HUGE = 10**18  # A larger number in a result is an error.
# The model of run directories from before these keys existed: the official one.
OFFICIAL_MODEL: dict[str, Any] = {
    "model.gelu": "tanh",
    "model.norm_eps": 1e-6,
    "model.position_std": POSITION_STD,
    "model.positions": "learned",
    "model.tubelet_init": "random",
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
    """What a stage's result depends on: recipe keys by dotted name, and the hashes of clips and starting weights."""
    flat = {
        key: value
        for key, value in flatten(stage.model_dump(mode="json")).items()
        if not any(key == skipped or key.startswith(skipped + ".") for skipped in FREE_KEYS)
    }
    # Run directories from before these keys existed lack them: a default value is left out, to match.
    if flat.get("freeze_trunk") is True:
        del flat["freeze_trunk"]
    if flat.get("trunk_precision") == "auto":
        del flat["trunk_precision"]
    if flat.get("data.decode_device") == "cpu":
        del flat["data.decode_device"]
    for key, official in OFFICIAL_MODEL.items():  # null means the official value.
        if flat.get(key) in (None, official):
            flat.pop(key, None)
    if flat.get("augment.resize") == "official":
        del flat["augment.resize"]
    own_seed = flat.pop("seed", None)  # The seed of stage 2's tail; "seed" is the run's.
    inputs = {
        **flat,
        **({"seed of the tail": own_seed} if own_seed is not None else {}),
        "seed": recipe.seed,
        "train clips (sha256)": index_sha256,
        "starting weights (sha256)": source_sha256,
    }
    masked: dict[str, Any] = without_secrets_in(inputs)
    return masked


def different_inputs(recorded: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The (recorded, wanted) values of the inputs in which a stage of a run directory is not the recipe's."""
    # Older run directories may hold secrets: a URL with a new signature is not another recipe.
    recorded = without_secrets_in(recorded)
    keys = sorted((recorded.keys() | wanted.keys()) - FREE_KEYS)  # Older runs recorded some of FREE_KEYS too.
    return {key: (recorded.get(key), wanted.get(key)) for key in keys if recorded.get(key) != wanted.get(key)}


def refuse_other_inputs(name: str, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises RecipeError, which names the keys, if the run directory's inputs and the recipe's (`wanted`) disagree."""
    if different := different_inputs(recorded, wanted):
        shown = "; ".join(f"{key}: was {was!r}, now {now!r}" for key, (was, now) in list(different.items())[:5])
        raise RecipeError(
            f"the run directory holds {name} of another recipe ({shown}); "
            f"use another --run-dir, or remove its {name} folder"
        )


def flatten(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested dictionaries into one with dotted keys; lists stay values."""
    out: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def read_done(directory: Path, numbers: Sequence[str] = RESULT_NUMBERS) -> dict[str, Any] | None:
    """A stage's `done.json`; None if the stage is not done. `numbers` are the keys that its result must have.

    Raises CheckpointError if it cannot be read or lacks one of them.
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
        why = explain(error, file)
        raise CheckpointError(f"{file} cannot be read ({why}); remove it to run the stage again") from error


def write_done(
    directory: Path, inputs: dict[str, Any], result: dict[str, Any], files: dict[str, dict[str, Any]] | None = None
) -> None:
    """Writes `done.json`, with size and sha256 of the stage's `files` by name. Raises OSError.

    models/weights_file.py checks them when it reads the files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / DONE, {"inputs": inputs, "result": result, "files": files or {}})


def keep_recipe(directory: Path, recipe: Recipe) -> None:
    """Writes `recipe.yaml` of a run directory if it changes. Raises OSError, and then leaves the old file intact."""
    write_if_new(directory / RECIPE, record_recipe(recipe))


def try_to_keep(path: Path, keep: Callable[[], object]) -> None:
    """Calls `keep`, which writes `path`, a record that no run depends on. An OSError is reported; the run goes on."""
    try:
        keep()
    except OSError as error:
        warn_unwritten(path, error)


def collect_results(run_dir: Path) -> dict[str, Any]:
    """The stages' own results and the totals of result.json, without the cost ratio (cost.py)."""
    stages = {
        name: done["result"]
        for name in RUN_STEPS
        if name not in (TEST, REPORT) and (done := read_done(run_dir / name)) is not None
    }
    last = list(stages.values())[-1] if stages else {}
    totals = {key: last.get(key) for key in ("trainable_parameters", "frozen_parameters", "optimizer_bytes_per_rank")}
    seconds = sum(stage["seconds"] for stage in stages.values())
    return {"stages": stages, "total_seconds": seconds, **totals}


def environment_record(runtime: Runtime, decoder: str) -> dict[str, Any]:
    """The content of env.json: versions, commit, command, hosts and devices. Collective."""
    device = (
        torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else platform.processor() or "cpu"
    )
    ranks = runtime.gather({"host": runtime.host, "device": device})
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
        "command": shlex.join(without_secrets(word) for word in sys.argv),
        "decoder": decoder,
        "launcher": runtime.launch.launcher,
        "world_size": runtime.world_size,
        "ranks": ranks,
    }


def recorded_decoder(run_dir: Path) -> str | None:
    """The decoder that env.json records for a run; None if it is missing or cannot be read."""
    try:
        return str(read_object(run_dir / ENVIRONMENT, decoder=str)["decoder"])
    except (OSError, ValueError):  # env.json is rewritten at each start, and nothing depends on it.
        return None


@functools.cache
def code_sha256() -> str:
    """sha256 over the names and bytes of the package's Python files, as they are at the first call."""
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
        return None  # Not a git checkout, or no git. env.json has the version too.
    return out.stdout.strip()


def setup_table(
    name: str,
    stage: StageBlock,
    written: EngineBlock,
    parameters: tuple[int, int],
    clips: tuple[int, int],
    steps: tuple[int, int],
    world_size: int,
    optimizer_bytes: int,
) -> Table:
    """The table printed at the start of a stage.

    `written` is the recipe's engine, which that of `stage` stands for. `parameters` are (trainable, frozen), `clips`
    (train, val) and `steps` (per epoch, micro-batches per step).
    """
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
            f"{optimizer_bytes / 2**20:,.1f} MiB per rank ({stage.optimizer.name}, {written.title_of(stage.engine)})",
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
    """The number of samples of an index, 0 without one."""
    return 0 if index is None else len(index)
