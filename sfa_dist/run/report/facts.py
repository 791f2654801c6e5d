"""What was run, on what, and what happened: recipe, machines, stages, memory, starts, events and bad clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfa_dist.boundary.counted import counted
from sfa_dist.errors import SfaError
from sfa_dist.plan.memory import predict
from sfa_dist.recipe.schema import StageBlock
from sfa_dist.run.report.document import Block, Code, Section, Table, Text
from sfa_dist.run.report.energy import energy_blocks
from sfa_dist.run.report.run_files import RunFiles

GIB = 2**30
UNKNOWN = "not recorded"
STAGE_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("steps", "steps", "{:,}"),
    ("seconds", "seconds", "{:,.0f}"),
    ("gpu_seconds", "rank-seconds", "{:,.0f}"),
    ("peak_memory_gib", "peak memory (GiB)", "{:.2f}"),
    ("trainable_parameters", "trainable", "{:,}"),
    ("frozen_parameters", "frozen", "{:,}"),
    ("optimizer_bytes_per_rank", "optimizer bytes per rank", "{:,}"),
    ("bad_samples", "bad clips", "{:,}"),
    ("data_share", "waiting for clips", "{:.0%}"),
)
BAD_COLUMNS = ("shard", "key", "reason", "stages")
SHOWN_BAD_CLIPS = 500


def run_sections(run: RunFiles) -> list[Section]:
    """What was run and with what; the stages; what happened."""
    happened: list[Block] = [*_attempts(run), *_events(run), *_looped(run), *_bad_clips(run)]
    return [
        Section(
            "What was run",
            [*_setup(run), Table("Where and with what", ["fact", "value"], machine_rows(run)), *_recipe(run)],
        ),
        Section("Stages", [*stage_tables(run), *_memory(run), *energy_blocks(run)]),
        Section("What happened", happened),
    ]


def _setup(run: RunFiles) -> list[Block]:
    if not run.stages:
        return [Text("The run has no recipe.yaml that this version reads, so its settings are not shown.")]
    heads = ["stage", "frames", "stride", "batch", "epochs", "optimizer", "learning rate"]
    rows = [
        [
            name,
            str(stage.frames),
            str(stage.data.stride),
            str(stage.batch.size),
            f"{stage.schedule.epochs:g}",
            stage.optimizer.name,
            f"{stage.optimizer.lr:g}",
        ]
        for name, stage in run.stages.items()
    ]
    return [Table("Settings of the recipe", heads, rows)]


def _recipe(run: RunFiles) -> list[Block]:
    return [Code("The resolved recipe", run.recipe_text)] if run.recipe_text else []


def machine_rows(run: RunFiles) -> list[list[str]]:
    """(what, value) of code, command, machines and versions."""
    env = run.env
    ranks = env.get("ranks", [])
    devices = sorted({rank["device"] for rank in ranks})
    hosts = counted(len({rank["host"] for rank in ranks}), "host")
    versions = {"python": env.get("python"), **env.get("versions", {})}
    return [
        ["recipe", run.recipe.name if run.recipe else UNKNOWN],
        ["command", str(env.get("command") or UNKNOWN)],
        ["commit", str(env.get("commit") or f"version {env.get('sfa_dist', UNKNOWN)}")],
        ["ranks", f"{len(ranks)} on {hosts}, {', '.join(devices)}" if ranks else UNKNOWN],
        ["launcher, decoder", f"{env.get('launcher', UNKNOWN)}, {env.get('decoder', UNKNOWN)}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version) or UNKNOWN],
        ["events", ", ".join(_counts(run)) or "none"],
    ]


def _counts(run: RunFiles) -> list[str]:
    counts = {name: len(run.events(name)) for name in ("resume", "preempted", "fallback", "bad_sample")}
    return [f"{count} {name}" for name, count in counts.items() if count]


def stage_tables(run: RunFiles) -> list[Block]:
    """Steps, seconds, memory and parameters of each stage, as result.json has them."""
    stages = run.result.get("stages", {})
    if not stages:
        return [Text("No stage's numbers yet: result.json, which the test writes, is not there.")]
    shown = [column for column in STAGE_COLUMNS if any(column[0] in stage for stage in stages.values())]
    rows = [
        [name, *(form.format(stage[key]) if key in stage else UNKNOWN for key, _, form in shown)]
        for name, stage in stages.items()
    ]
    return [Table("Steps, seconds, memory and parameters", ["stage", *(title for _, title, _ in shown)], rows)]


def _memory(run: RunFiles) -> list[Block]:
    """Planned beside measured. On CPUs what is measured is the whole process, and there is nothing to compare."""
    devices = {str(rank["device"]) for rank in run.env.get("ranks", [])}
    measured = {
        name: stage["peak_memory_gib"]
        for name, stage in run.result.get("stages", {}).items()
        if name in run.stages and "peak_memory_gib" in stage
    }
    if not measured:
        return []
    if not devices or not _are_gpus(devices):
        return [
            Text(
                "Memory planned against measured: the plan is for GPUs, and this run had none; "
                "peak memory is that of the whole process."
            )
        ]
    rows = []
    for name, peak in measured.items():
        planned = _planned(run.stages[name], len(run.env["ranks"]))
        off = "" if planned is None else f"{peak / planned - 1:+.0%}"
        rows.append([name, "cannot be planned" if planned is None else f"{planned:.2f}", f"{peak:.2f}", off])
    return [Table("Memory planned and measured", ["stage", "planned (GiB)", "measured (GiB)", "difference"], rows)]


def _are_gpus(devices: set[str]) -> bool:
    return all(any(word in device for word in ("NVIDIA", "AMD Instinct", "Tesla", "GeForce")) for device in devices)


def _planned(stage: StageBlock, ranks: int) -> float | None:
    """GiB of a rank's tensors at their peak, as `sfa plan` has them."""
    try:
        return predict(stage.on_ranks(ranks), ranks).peak_bytes / GIB
    except (SfaError, ValueError, RuntimeError):
        return None  # The table says so.


def _attempts(run: RunFiles) -> list[Block]:
    rows = [
        [
            str(entry.get("began", UNKNOWN)),
            UNKNOWN if entry.get("code") is None else str(entry["code"]),
            str(entry.get("stage") or ""),
            "" if entry.get("step") is None else f"{entry['step']:,}",
            str(entry.get("error") or "none"),
        ]
        for entry in run.attempts
    ]
    return [Table("Starts", ["began", "exit code", "stage", "step", "error"], rows, long=True)] if rows else []


def _events(run: RunFiles) -> list[Block]:
    """How often each event was logged, by stage, and at which steps first and last."""
    found: dict[tuple[str, str], list[Any]] = {}
    for event in run.events():
        found.setdefault((str(event.get("stage") or ""), str(event.get("event"))), []).append(event.get("step"))
    rows = []
    for (stage, name), steps in found.items():
        known = [step for step in steps if isinstance(step, int)]
        ends = [f"{min(known):,}", f"{max(known):,}"] if known else ["", ""]
        rows.append([name, stage, f"{len(steps):,}", *ends])
    return [Table("Events", ["event", "stage", "times", "first step", "last step"], rows, long=True)] if rows else []


def _looped(run: RunFiles) -> list[Block]:
    lines = [
        f"{each.get('stage')}: {each['text']}" for each in run.events("notice") if "looped" in str(each.get("text"))
    ]
    return [Text(line) for line in dict.fromkeys(lines)] or [Text("No looped clips were reported.")]


def _bad_clips(run: RunFiles) -> list[Block]:
    bad = bad_clips(run)
    if not bad:
        return [Text("No bad clips were reported.")]
    rest = len(bad) - SHOWN_BAD_CLIPS
    more = [Text(f"and {rest:,} more: log.jsonl names each (bad_sample)")] if rest > 0 else []
    return [Table(f"Bad clips ({len(bad):,})", BAD_COLUMNS, bad[:SHOWN_BAD_CLIPS]), *more]


def bad_clips(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """(shard, key, reason, stages) of each bad clip, once, in order of shard and key."""
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for record in run.events("bad_sample"):
        shard, _, key = record["key"].partition("/")
        _, stages = found.setdefault((shard, key), ("", []))
        stages += [record["stage"]] if record["stage"] not in stages else []
        found[shard, key] = (record["reason"], stages)
    return [(shard, key, reason, ", ".join(stages)) for (shard, key), (reason, stages) in sorted(found.items())]
