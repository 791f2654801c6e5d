"""Faults of shards: damaged clips, shards cut, exchanged or replaced, and members that would run code."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator

from sfa_dist.chaos import injectors
from sfa_dist.chaos.bench import PATIENCE_S, Bench, BrokenError, codes, output_of
from sfa_dist.chaos.oracle import events, log_lines
from sfa_dist.chaos.trials import DATA_IS_CHECKED, EXACTLY_ONCE, NO_CODE, trial
from sfa_dist.data.batches.planned import LoaderSettings, train_plan
from sfa_dist.data.batches.stream import train_loader
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.recipe.schema import StageBlock

AUDITED_RANKS = (1, 2, 3)
BUDGET = "data.max_bad_fraction=0.02"  # Two of the first hundred clips.


def _first_stage_only(bench: Bench) -> tuple[str, ...]:
    return ("--stage", bench.first_stage)


@trial(DATA_IS_CHECKED, "one bit of one clip flipped", rows=(34,))
def flipped_clip(bench: Bench) -> str:
    """The clip has weight 0 and is named in each epoch; no other clip replaces it."""
    shards, arguments = bench.own_clips()
    name = injectors.damage_clip(bench.chance.choice(shards), bench.chance)
    epochs = bench.workplace.stages[bench.first_stage].schedule.epochs
    job = bench.start("run", *_first_stage_only(bench), *arguments, sets=("data.max_bad_fraction=1.0",))
    ends = job.ends(PATIENCE_S)
    if any(end.code for end in ends):
        raise BrokenError(codes(ends), output_of(ends))
    named = Counter(event["key"] for event in events(bench.folder / "run", "bad_sample"))
    if set(named) != {name}:
        raise BrokenError(f"{name} was damaged, but these were named: {dict(named)}")
    last = [line for line in log_lines(bench.folder / "run") if line["kind"] == "train"][-1]
    clips = len(load_index(shards))
    whole = bench.workplace.stages[bench.first_stage].schedule.max_steps is None
    if whole and (last["samples_seen"], last["bad_samples"]) != ((clips - 1) * epochs, epochs):
        raise BrokenError(f"{last['samples_seen']} clips seen and {last['bad_samples']} bad ones of {clips} x {epochs}")
    seen = f"{last['samples_seen']} good clips seen and {last['bad_samples']} bad ones"
    return f"{name} named {named[name]} times, {seen}"


@trial(DATA_IS_CHECKED, "all clips of all shards damaged", rows=(48,))
def all_clips_damaged(bench: Bench) -> str:
    """No step trains on nothing, and no rank hangs."""
    shards, arguments = bench.own_clips()
    count = sum(injectors.damage_all_clips(shard, bench.chance) for shard in shards)
    job = bench.start("run", *_first_stage_only(bench), *arguments, sets=(BUDGET,))
    line = bench.refused(job.ends(PATIENCE_S), 65, "max_bad_fraction")
    return f"{count} clips damaged, 65: {bench.quote(line)}"


@trial(DATA_IS_CHECKED, "a shard cut short after it was indexed", rows=(33,))
def cut_shard(bench: Bench) -> str:
    """A plain stream reader would take it for a shorter shard."""
    shards, arguments = bench.own_clips()
    chosen = bench.chance.choice(shards)
    done = injectors.truncate(chosen, bench.chance)
    job = bench.start("run", *_first_stage_only(bench), *arguments)
    bench.refused(job.ends(PATIENCE_S), (65, 78), chosen.name)
    return f"{done}: refused by name"


@trial(DATA_IS_CHECKED, "a shard cut short, without an index", rows=(33,))
def cut_shard_without_index(bench: Bench) -> str:
    """The walk that builds the index finds the offset."""
    shards, arguments = bench.own_clips()
    chosen = bench.chance.choice(shards)
    done = injectors.truncate(chosen, bench.chance)
    injectors.forget_index(chosen.parent)
    job = bench.start("run", *_first_stage_only(bench), *arguments)
    bench.refused(job.ends(PATIENCE_S), 65, chosen.name, "offset")
    return f"{done}: refused by name and offset"


@trial(DATA_IS_CHECKED, "the contents of two shards exchanged", rows=(45,))
def swapped_shards(bench: Bench) -> str:
    """The index has the size of each shard and the checksum of each clip."""
    shards, arguments = bench.own_clips()
    one, other = bench.chance.sample(shards, 2)
    done = injectors.swap(one, other)
    job = bench.start("run", *_first_stage_only(bench), *arguments, sets=(BUDGET,))
    line = bench.refused(job.ends(PATIENCE_S), (65, 78))
    if not (one.name in line or other.name in line):
        raise BrokenError(f"{done}, but the error names neither: {line}")
    return f"{done}: {bench.quote(line)}"


@trial(DATA_IS_CHECKED, "a shard replaced between run and resume", rows=(45,))
def replaced_shard(bench: Bench) -> str:
    """The new shard is valid and indexed again: only the hash of all clips shows the change."""
    shards, arguments = bench.own_clips()
    job = bench.start("run", *_first_stage_only(bench), *arguments)
    # Without a checkpoint the run would start over, and other clips would be allowed.
    bench.until(job, lambda: bool(bench.checkpoints()))
    job.send_to_groups(signal.SIGKILL)
    job.ends(PATIENCE_S)
    done = injectors.drop_last_sample(bench.chance.choice(shards))
    injectors.forget_index(shards[0].parent)
    line = bench.refused(bench.start("run", *_first_stage_only(bench), *arguments).ends(PATIENCE_S), 78, "train clips")
    return f"{done}: 78, {bench.quote(line)}"


@trial(NO_CODE, "members in a shard that WebDataset unpickles", rows=(42,))
def hostile_members(bench: Bench) -> str:
    """The members are named and never opened."""
    shards, arguments = bench.own_clips()
    canary = bench.folder / "canary"
    done = injectors.add_hostile_members(bench.chance.choice(shards), canary)
    injectors.forget_index(shards[0].parent)
    ends = bench.start("run", *_first_stage_only(bench), *arguments).ends(PATIENCE_S)
    if {end.code for end in ends} - {0, 65}:
        raise BrokenError(codes(ends), output_of(ends))
    if canary.exists():
        raise BrokenError("a member was executed")
    return f"{done}: {codes(ends)}, nothing executed"


@trial(EXACTLY_ONCE, "an audit of epochs over 1, 2 and 3 ranks, with a damaged clip and a change of ranks", rows=(70,))
def exactly_once(bench: Bench) -> str:
    """With the real loader: the ids of clips with weight 1 and those of damaged clips together are the index."""
    shards, _ = bench.own_clips()
    name = injectors.damage_clip(bench.chance.choice(shards), bench.chance)
    stage = bench.workplace.stages[bench.first_stage]
    index = load_index(shards)
    audits = 0
    for epoch in range(2):
        for ranks in AUDITED_RANKS:
            for cut in {0, bench.chance.randrange(len(train_plan(index, stage.data, stage.batch, 0).shard_sizes))}:
                then = bench.chance.choice(AUDITED_RANKS)
                parts = [(ranks, 0, cut), (then, cut, None)]
                _audit(index, [item for part in parts for item in _seen(bench, index, stage, epoch, *part)], name)
                audits += 1
    return f"{len(index)} clips, {audits} epochs: each clip once, {name} in the ledger{_audit_real(bench)}"


def _seen(
    bench: Bench, index: SampleIndex, stage: StageBlock, epoch: int, ranks: int, first: int, last: int | None
) -> Iterator[tuple[int, bool]]:
    """(sample, whether it has weight) over all ranks, for the optimizer steps of an epoch from `first` up to `last`."""
    for rank in range(ranks):
        seed, size = bench.workplace.recipe.seed, stage.model.image_size
        settings = LoaderSettings(stage.data, stage.batch, stage.augment, stage.frames, size, seed, rank, ranks)
        loader = train_loader(index, settings, epoch=epoch, start_step=first)
        accumulation = stage.batch.accumulation(ranks)
        for number, batch in enumerate(loader):
            if last is not None and first + number // accumulation >= last:
                break
            for sample, weight in zip(batch.ids.tolist(), batch.weights.tolist(), strict=True):
                if sample >= 0:
                    yield sample, weight > 0


def _audit(index: SampleIndex, seen: list[tuple[int, bool]], damaged: str) -> None:
    times = Counter(sample for sample, _ in seen)
    wrong = [index.name(sample) for sample in range(len(index)) if times[sample] != 1]
    if wrong or len(times) != len(index):
        raise BrokenError(f"{len(wrong)} of {len(index)} clips were not seen exactly once", wrong)
    without = [index.name(sample) for sample, counts in seen if not counts]
    if without != [damaged]:
        raise BrokenError(f"clips without weight: {without}; the damaged one is {damaged}")


def _audit_real(bench: Bench) -> str:
    """The same of the sample plan over all of the user's training shards, if all have an index."""
    paths = bench.workplace.real_shards
    if not paths:
        return (
            "" if bench.workplace.source.startswith("the built-in") else "; the recipe's own shards have no index yet"
        )
    index = load_index(paths)
    stage = bench.workplace.stages[bench.first_stage]
    for ranks in AUDITED_RANKS:
        plan = train_plan(index, stage.data, stage.batch, bench.workplace.recipe.seed, stage.augment.mixup)
        times: Counter[int] = Counter()
        for step in range(plan.steps_per_epoch):
            for rank in range(ranks):
                for part in range(plan.accumulation(ranks, stage.batch.micro)):
                    ids = plan.micro_batch_ids(0, step, rank, ranks, stage.batch.micro, part)
                    times.update(int(sample) for sample in ids if sample >= 0)
        if len(times) != len(index) or set(times.values()) != {1}:
            raise BrokenError(f"not each of the recipe's {len(index)} clips is planned exactly once on {ranks} ranks")
    return f"; and each of the recipe's {len(index):,} clips is planned once"
