"""`cost_ratio` of result.json: what training cost, over what end-to-end training of stage 2's frames costs.

Both are seconds of optimizer steps, without evaluation and saving. Training is counted as the paper counts it: stage 1
and stage 2. A feature cache is counted too, because it runs stage 2's trunk; an image stage is not. The denominator is

    measured      the seconds of an end-to-end run, `log.baseline`, on the same clips, frames, epochs, batch and machine
    calibrated    the steps of stage 2, times the mean of a few end-to-end steps (`log.calibrate_steps`)

The ratio is null, with the reason, where neither can be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfa_dist.boundary.counted import counted
from sfa_dist.boundary.disk import read_object
from sfa_dist.boundary.file_names import CALIBRATION, ENVIRONMENT
from sfa_dist.errors import CheckpointError
from sfa_dist.recipe.schema import Recipe
from sfa_dist.recipe.stage_names import CACHE
from sfa_dist.run.record import read_done

MEASURED, CALIBRATED = "measured", "calibrated"
RATIO, SOURCE, TERMS, REASON = "cost_ratio", "cost_ratio_source", "cost_ratio_terms", "cost_ratio_reason"
KEYS = (RATIO, SOURCE, TERMS, REASON)
COUNTED = ("stage1", CACHE, "stage2")  # What the paper counts; the cache is made by stage 2's trunk.
CLIPS, START = "train clips (sha256)", "starting weights (sha256)"  # Inputs of a stage (record.py).
SAME = ("frames", "batch.size", "schedule.epochs", "data.stride", CLIPS)  # With all of `model`: what a step costs.
FREE_OF_COST = "model.drop_path"

Done = dict[str, Any]  # The content of a done.json.


class _UnknownError(Exception):
    """Why a ratio cannot be had."""


def cost_of(run_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """The keys of result.json about the cost (KEYS).

    TERMS holds the two `seconds`, and the `baseline` or the number of `timed_steps`. REASON says why the ratio is not
    known, or why it is calibrated where the recipe names a baseline.
    """
    reasons = []
    for asked, ratio in ((recipe.log.baseline, _measured), (recipe.log.calibrate_steps, _calibrated)):
        if asked:
            try:
                source, terms = ratio(run_dir, recipe)
            except (_UnknownError, CheckpointError) as error:
                reasons.append(str(error))
            else:
                known = {RATIO: terms["seconds"] / terms["baseline_seconds"], SOURCE: source, TERMS: terms}
                return {**known, **({REASON: reasons[0]} if reasons else {})}
    why = "; ".join(reasons) or "neither log.baseline nor log.calibrate_steps is set"
    return unknown_cost(why)


def unknown_cost(reason: str) -> dict[str, Any]:
    """The keys of a result whose ratio is not known."""
    return {RATIO: None, SOURCE: None, REASON: reason}


def cost_words(result: Mapping[str, Any]) -> str:
    """Where a known ratio comes from: `measured: runs/baseline`, or `calibrated: 5 timed steps`."""
    terms = result.get(TERMS)
    if isinstance(terms, dict) and result.get(SOURCE) == MEASURED:
        return f"{MEASURED}: {terms.get('baseline')}"
    if isinstance(terms, dict) and isinstance(steps := terms.get("timed_steps"), int):
        return f"{CALIBRATED}: {counted(steps, 'timed step')}"
    return RATIO


def with_present_cost(result: dict[str, Any], run_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """A result with the ratio that the recipe asks for now; as it is where it asks for none.

    A known ratio to what is asked for stays: a start on other ranks or devices cannot find it again.
    """
    if not recipe.log.baseline and not recipe.log.calibrate_steps:
        return result
    present = cost_of(run_dir, recipe)
    terms = result.get(TERMS) or {}
    same = (terms.get("baseline"), terms.get("timed_steps")) in (
        (str(Path(recipe.log.baseline or "")), None),  # As `_measured` writes it.
        (None, recipe.log.calibrate_steps),
    )
    if present[RATIO] is None and result.get(RATIO) is not None and same:
        return result
    return {**{key: value for key, value in result.items() if key not in KEYS}, **present}


def _measured(run_dir: Path, recipe: Recipe) -> tuple[str, dict[str, Any]]:
    stages = _trained(run_dir, recipe)
    folder = Path(recipe.log.baseline or "")
    where = f"log.baseline {folder}"
    if read_done(folder / "stage2", numbers=()) is not None:
        raise _UnknownError(f"{where} is no end-to-end run: it has a stage 2")
    baseline = read_done(folder / "stage1")
    if baseline is None:
        raise _UnknownError(f"{where} has no finished stage 1, in which everything is trained")
    other = _differences(stages["stage2"], baseline)
    if _machine(folder) != _machine(run_dir):
        other.append(f"on {_machine(folder)}, this run on {_machine(run_dir)}")
    if other:
        raise _UnknownError(f"{where} cannot be compared: {'; '.join(other)}")
    _require_same_ranks({**stages, str(folder): baseline})
    seconds = {"seconds": _seconds(stages), "baseline_seconds": baseline["result"]["seconds"]}
    return MEASURED, {**_positive(seconds), "baseline": str(folder)}


def _calibrated(run_dir: Path, recipe: Recipe) -> tuple[str, dict[str, Any]]:
    stages = _trained(run_dir, recipe)
    _require_same_ranks(stages)
    file = run_dir / "stage2" / CALIBRATION
    try:
        timed = read_object(file, steps=int, ranks=int)
    except FileNotFoundError:
        raise _UnknownError("end-to-end steps were not timed: run stage 2 with log.calibrate_steps") from None
    except (OSError, ValueError) as error:
        raise _UnknownError(f"{file} cannot be read ({error})") from None
    seconds = timed.get("step_seconds")
    if not isinstance(seconds, float):
        raise _UnknownError(f"end-to-end steps could not be timed: {timed.get('reason')}")
    if timed["ranks"] != ranks_of(stages["stage2"]):
        ranks = f"{timed['ranks']} ranks, stage 2 was trained on {ranks_of(stages['stage2'])}"
        raise _UnknownError(f"end-to-end steps were timed on {ranks}: remove {file} to time them again")
    whole = {"seconds": _seconds(stages), "baseline_seconds": seconds * stages["stage2"]["result"]["steps"]}
    return CALIBRATED, {**_positive(whole), "timed_steps": timed["steps"]}


def _trained(run_dir: Path, recipe: Recipe) -> dict[str, Done]:
    """`done.json` of all that counts: stage 1, stage 2 and the feature cache between them."""
    if recipe.stage1 is None or recipe.stage2 is None:
        raise _UnknownError("the recipe has no stage 2, whose frames an end-to-end training would take")
    second = read_done(run_dir / "stage2")
    if second is None:
        raise _UnknownError("stage 2 is not finished")
    given = recipe.stage1.weights
    first = read_done(Path(given).parent if given else run_dir / "stage1")
    if first is None:
        where = f"there is no done.json beside {given}" if given else "it is not finished"
        raise _UnknownError(f"what stage 1 cost is not known: {where}")
    if given and first.get("files", {}).get(Path(given).name, {}).get("sha256") != second["inputs"].get(START):
        raise _UnknownError(f"what stage 1 cost is not known: done.json beside {given} is of other weights")
    found = {"stage1": first, "stage2": second}
    if recipe.stage2.cache is not None:
        cache = read_done(run_dir / CACHE)
        if cache is None or not cache["result"]["seconds"]:  # It was in a shared folder (stage2.cache.dir).
            raise _UnknownError("what the feature cache cost is not known: another run built it")
        found[CACHE] = cache
    return found


def _differences(stage2: Done, baseline: Done) -> list[str]:
    """What makes the baseline another training than stage 2's frames, end to end."""
    mine, other = stage2["inputs"], baseline["inputs"]
    keys = [*SAME, *sorted(key for key in mine.keys() | other.keys() if key.startswith("model."))]
    shown = [
        f"{key} {other.get(key)!r}, in stage 2 {mine.get(key)!r}" if key != CLIPS else "other training clips"
        for key in keys
        if mine.get(key) != other.get(key) and key != FREE_OF_COST
    ]
    steps = stage2["result"]["steps"], baseline["result"]["steps"]
    return shown or ([f"{steps[1]} steps, in stage 2 {steps[0]}"] if steps[0] != steps[1] else [])


def _machine(run_dir: Path) -> str:
    """The devices of a run's last start, such as `8 x NVIDIA H200`."""
    try:
        ranks = read_object(run_dir / ENVIRONMENT, ranks=list)["ranks"]
        devices = sorted(str(rank["device"]) for rank in ranks)
    except (OSError, ValueError, TypeError, KeyError):
        raise _UnknownError(f"the machine of {run_dir} is not known: {ENVIRONMENT} cannot be read") from None
    return ", ".join(f"{devices.count(device)} x {device}" for device in dict.fromkeys(devices))


def ranks_of(done: Done) -> int:
    """The number of ranks on which a stage was trained; 1 for one without a step."""
    result = done["result"]
    return round(result["gpu_seconds"] / result["seconds"]) if result["seconds"] else 1


def _require_same_ranks(parts: Mapping[str, Done]) -> None:
    ranks = {name: ranks_of(done) for name, done in parts.items() if done["result"]["seconds"]}
    if len(set(ranks.values())) > 1:
        shown = ", ".join(f"{name} on {count}" for name, count in ranks.items())
        raise _UnknownError(f"seconds on different numbers of ranks cannot be compared ({shown})")


def _seconds(stages: Mapping[str, Done]) -> float:
    return sum(done["result"]["seconds"] for done in stages.values())


def _positive(seconds: dict[str, float]) -> dict[str, float]:
    if not all(value > 0 for value in seconds.values()):
        raise _UnknownError("no seconds were counted")
    return seconds
