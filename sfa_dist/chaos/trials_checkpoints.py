"""Faults on the disk: damaged or hostile checkpoints, a full disk, weights that are not finite."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

from sfa_dist.boundary.file_names import CHECKPOINTS
from sfa_dist.chaos import injectors
from sfa_dist.chaos.bench import PATIENCE_S, Bench, BrokenError
from sfa_dist.chaos.oracle import events
from sfa_dist.chaos.trials import CHECKPOINTS_HOLD, DISK_IS_LOUD, FINITE, NO_CODE, trial
from sfa_dist.checkpoint import newest_valid
from sfa_dist.checkpoint.failpoints import VARIABLE

DIVERGES = ("optimizer.lr=1.0e30", "optimizer.clip_norm=0.0", "schedule.warmup_epochs=0.0", "checkpoint.every_steps=1")


def _damaged(bench: Bench, name: str, damage: Callable[[Path, Path], str]) -> str:
    """Damages the newest checkpoint of a killed run, which must resume from the one before."""
    stage, run = bench.first_stage, name
    bench.killed_run(run)
    older, newest = bench.checkpoints(run)[-2:]
    done = damage(newest, older)
    bench.complete(run, "--stage", stage)
    reason = bench.fell_back(run)
    if newest.name not in reason:
        raise BrokenError(f"{done}: the reason of the fallback does not name {newest.name}: {reason}")
    bench.same_bits(run, stages=(stage,))
    return done


def _each_or_one(bench: Bench, damage: Callable[[Path], str]) -> str:
    """Damages a random file of a checkpoint, or with --thorough every file, each in a run of its own."""
    names = [path.name for path in injectors.checkpoint_files(_newest(bench))]
    chosen = names if bench.thorough else [bench.chance.choice(names)]
    done = [_damaged(bench, name, lambda newest, _, name=name: damage(newest / name)) for name in chosen]  # type: ignore[misc]
    more = f" (and {len(done) - 1} other files)" if len(done) > 1 else ""
    return f"{done[0]}{more}: reported, and resumed from the one before; the same bits"


def _newest(bench: Bench) -> Path:
    """The newest checkpoint of the killed run, of which trials damage copies."""
    folder = bench.references.killed(bench.ranks) / bench.first_stage / CHECKPOINTS
    return max(folder.glob("step-????????"))


@trial(CHECKPOINTS_HOLD, "a checkpoint file cut short", rows=(20,))
def cut_checkpoint(bench: Bench) -> str:
    """The storage has lost the end of a save."""
    return _each_or_one(bench, lambda file: injectors.truncate(file, bench.chance))


@trial(CHECKPOINTS_HOLD, "one bit of a checkpoint flipped", rows=(21,))
def flipped_checkpoint(bench: Bench) -> str:
    """No library notices it in the bytes of a tensor; the sha256 of the manifest does."""
    return _each_or_one(bench, lambda file: injectors.flip_bit(file, bench.chance))


@trial(CHECKPOINTS_HOLD, "a checkpoint file deleted", rows=(22,))
def deleted_checkpoint(bench: Bench) -> str:
    """The part of one rank, the state, or the manifest."""
    return _each_or_one(bench, lambda file: injectors.delete(file, bench.chance))


@trial(CHECKPOINTS_HOLD, "files of two checkpoints exchanged", rows=(20,))
def swapped_checkpoint(bench: Bench) -> str:
    """Each file is valid by itself. The exchange damages both checkpoints."""
    stage = bench.first_stage
    bench.killed_run()
    oldest, older, newest = bench.checkpoints()[-3:]
    done = injectors.swap_with_older(newest, older, bench.chance)
    bench.complete("run", "--stage", stage)
    blamed = [event["reason"] for event in events(bench.folder / "run", "fallback")]
    if [name for name in (newest.name, older.name) if not any(name in reason for reason in blamed)]:
        raise BrokenError(f"{done}: not both were reported as damaged ({blamed})")
    bench.same_bits(stages=(stage,))
    return f"{done}: both reported, resumed from {oldest.name}; the same bits"


@trial(CHECKPOINTS_HOLD, "all checkpoints damaged", rows=(22,))
def all_checkpoints_damaged(bench: Bench) -> str:
    """The run is refused: starting over without a word would lose it."""
    bench.killed_run()
    for checkpoint in bench.checkpoints():
        injectors.flip_bit(bench.chance.choice(injectors.checkpoint_files(checkpoint)), bench.chance)
    before = [path.name for path in bench.checkpoints()]
    line = bench.refused(bench.start().ends(PATIENCE_S), 74, "is intact")
    if [path.name for path in bench.checkpoints()] != before:
        raise BrokenError("the refused start removed checkpoints")
    return f"74: {bench.quote(line)}"


@trial(NO_CODE, "a hostile pickle as checkpoint and as weights", rows=(25,))
def hostile_checkpoint(bench: Bench) -> str:
    """The pickle replaces a checkpoint's tensors, with a matching manifest, and weights files that a recipe names."""
    canary = bench.folder / "canary"
    bench.killed_run()
    injectors.replace_by_pickle(bench.checkpoints()[-1], canary)
    ends = bench.start("run", "--stage", bench.first_stage).ends(PATIENCE_S)
    taken = all(end.code == 0 for end in ends)
    lines = [f"the one before was taken ({bench.fell_back()})" if taken else bench.refused(ends, (74, 78))]
    if "stage1" in bench.workplace.stages:
        for key, suffix in (("image_checkpoint", "pth"), ("weights", "safetensors")):
            hostile = bench.folder / f"hostile.{suffix}"
            hostile.write_bytes(injectors.pickle_that_touches(canary))
            stage = "stage2" if key == "weights" and bench.workplace.recipe.stage2 else "stage1"
            arguments = ("--set", f"stage1.{key}={hostile}", "--stage", stage)
            lines.append(bench.refused(bench.start(key, *arguments).ends(PATIENCE_S), (74, 78), hostile.name))
    if canary.exists():
        raise BrokenError("the pickle was executed", lines)
    return f"{len(lines)} hostile files, nothing executed; of the checkpoint: {bench.quote(lines[0])}"


@trial(DISK_IS_LOUD, "the disk is full in a save", rows=(18,), on="one")
def full_disk(bench: Bench) -> str:
    """The disk is a small tmpfs if this user may mount one; else an error is injected into the write."""
    stage = bench.first_stage
    run = bench.folder / "run"
    run.mkdir()
    more = ("--stage", stage)
    if injectors.can_mount():
        size = int(2.5 * _checkpoint_bytes(bench)) + 300_000
        kept = bench.folder / "kept"
        job = bench.start("run", *more, prepare=injectors.small_disk(run, size, kept), sets=("checkpoint.keep=99",))
        how, run = f"a tmpfs of {size / 1000:,.0f} kB", kept
    else:
        job = bench.start("run", *more, environ={VARIABLE: f"save.write:enospc@step=6,stage={stage}"})
        how = "an ENOSPC injected into the write (this user may not mount a small disk)"
    line = bench.refused(job.ends(PATIENCE_S), 74, "no space left" if "tmpfs" in how else "o space left")
    found, faults = newest_valid(run / stage / CHECKPOINTS)
    if found is None or faults:
        raise BrokenError(f"the earlier checkpoints are not intact: {faults}")
    bench.complete(run.name, *more)
    if [event["step"] for event in events(run, "resume")] != [int(found.name[5:])]:
        raise BrokenError("it did not resume from the last checkpoint that was saved")
    bench.same_bits(run.name, stages=(stage,))
    return f"{how}: 74, {bench.quote(line)}; with room, resumed from {found.name}; the same bits"


def _checkpoint_bytes(bench: Bench) -> int:
    return sum(path.stat().st_size for path in _newest(bench).iterdir())


@trial(FINITE, "a learning rate of 1e30", rows=(63, 64))
def diverging_run(bench: Bench) -> str:
    """The run ends with 70, and every checkpoint that it leaves is finite."""
    stage = bench.first_stage
    job = bench.start("run", "--stage", stage, sets=DIVERGES)
    line = bench.refused(job.ends(PATIENCE_S), 70, "not finite", "lower optimizer.lr")
    for checkpoint in bench.checkpoints():
        if not _all_finite(checkpoint / "model.safetensors"):
            raise BrokenError(f"{checkpoint.name} holds weights that are not finite")
    if not events(bench.folder / "run", "non_finite"):
        raise BrokenError("log.jsonl has no event non_finite")
    return f"70: {bench.quote(line)}; {len(bench.checkpoints())} checkpoint(s) left, finite"


def _all_finite(file: Path) -> bool:
    """Whether all tensors of a safetensors file are finite. Reads the bytes: header length, header, fp32 tensors."""
    data = file.read_bytes()
    (header,) = struct.unpack_from("<Q", data)
    tensors = [value for key, value in json.loads(data[8 : 8 + header]).items() if key != "__metadata__"]
    if {tensor["dtype"] for tensor in tensors} != {"F32"}:
        raise BrokenError(f"{file} holds tensors that are not fp32")
    return all(math.isfinite(value) for (value,) in struct.iter_unpack("<f", data[8 + header :]))
