"""Runs as the paper's tables print them: model and frames, top-1, top-5, steps, training time and cost ratio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfa_dist.recipe.stages import ModelBlock, Stage1, Stage2
from sfa_dist.run.chance import heads_of, shows_top5
from sfa_dist.run.cost import COUNTED, RATIO, REASON, SOURCE, TERMS, cost_words
from sfa_dist.run.report.document import Block, Code, Items, Table
from sfa_dist.run.report.run_files import RunFiles
from sfa_dist.run.report.to_markdown import table_lines

HEADS = ("model", "top-1", "top-5", "steps", "train time", "cost ratio")
SIZES = ("width", "depth", "heads", "mlp", "patch")  # Keys that override what the name of a size says.
NONE = "-"
HOUR = 3600  # Seconds.
HOW = (
    "Accuracies in percent; steps of stage 1 + stage 2. Train time counts these two, as the paper does, and the "
    "feature cache, but no image stage."
)


def paper_blocks(runs: Mapping[str, RunFiles]) -> list[Block]:
    """A row for each run with a test result, where its cost ratio comes from, and the rows as Markdown to copy."""
    tested = {name: run for name, run in runs.items() if run.result}
    if not tested:
        return []
    several = len(runs) > 1
    rows = [_cells(run, f" ({name})" if several else "") for name, run in tested.items()]
    notes = [
        f"{f'Cost ratio of {name}' if several else 'Cost ratio'}: {cost_source(run)}." for name, run in tested.items()
    ]
    notes += [
        f"{name}: the train time is without stage 1, whose weights were given."
        for name, run in tested.items()
        if _lacks_stage1(run)
    ]
    table = Table("In the paper's format", HEADS, rows)
    to_copy = Code("To copy, as Markdown", "\n".join(table_lines(HEADS, rows)), folded=False)
    return [table, Items([HOW, *notes]), to_copy]


def _cells(run: RunFiles, remark: str) -> list[str]:
    result = run.result
    ratio = _ratio(run)
    return [
        model_words(run) + remark,
        _top1(result),
        f"{result['acc5'] * 100:.2f}" if shows_top5(result) and "acc5" in result else NONE,
        _steps(result),
        _time(_seconds(result)),
        NONE if ratio is None else f"{ratio:.2f}x",
    ]


def model_words(run: RunFiles) -> str:
    """The model as the paper names it, such as `ViViT-L 128f + SFA 8f`; what is not SFA is told in words."""
    if not run.stages:
        frames = run.result.get("frames")
        return run.name if frames is None else f"{run.name} {frames}f"
    last = list(run.stages.values())[-1]
    name = f"{_size(last.model)} {last.frames}f"
    if not isinstance(last, Stage2):
        return name
    first = run.stages.get("stage1")
    few = f"{first.frames}f" if first is not None and _is_trained(first) else None
    if last.freeze_trunk and last.adapter is not None and few:
        return f"{name} + SFA {few}"
    frozen = "spatial frozen" if last.freeze_trunk else "nothing frozen"
    adapter = "no adapter" if last.adapter is None else "adapter"
    return ", ".join([name, frozen, adapter, f"from {few}" if few else "without stage 1"])


def _size(model: ModelBlock) -> str:
    changed = any(getattr(model, key) is not None for key in SIZES)
    return f"ViViT-{model.size}{' (modified)' if changed else ''}"


def _is_trained(first: Any) -> bool:
    return isinstance(first, Stage1) and bool(first.given_weights or first.schedule.epochs)


def _top1(result: Mapping[str, Any]) -> str:
    """Of nouns and verbs those of the action, which the paper calls noun-verb, and of each."""
    of_heads = [
        f"{head.removesuffix('_')} {result[f'{head}acc1'] * 100:.2f}"
        for head in heads_of(result)
        if head not in ("", "action_")
    ]
    return f"{result['acc1'] * 100:.2f}" + (f" ({', '.join(of_heads)})" if of_heads else "")


def _steps(result: Mapping[str, Any]) -> str:
    stages = result.get("stages", {})
    steps = [stages[name]["steps"] for name in ("stage1", "stage2") if name in stages]
    return " + ".join(f"{count:,}" for count in steps if count) or NONE


def _seconds(result: Mapping[str, Any]) -> float | None:
    """What the ratio's numerator is, where there is a ratio; else the sum over the stages that count."""
    terms, stages = result.get(TERMS), result.get("stages", {})
    if isinstance(terms, dict) and isinstance(seconds := terms.get("seconds"), float):
        return seconds
    counted = [stages[name]["seconds"] for name in COUNTED if name in stages]
    return sum(counted) if counted else None


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds / HOUR:.2f} h" if seconds >= HOUR else f"{seconds:,.{0 if seconds >= 10 else 1}f} s"


def _ratio(run: RunFiles) -> float | None:
    """The ratio of result.json; 1 of a run that is trained end to end, as the paper prints its baselines."""
    ratio = run.result.get(RATIO)
    return 1.0 if ratio is None and _is_end_to_end(run) else ratio


def _is_end_to_end(run: RunFiles) -> bool:
    first = run.stages.get("stage1")
    return "stage2" not in run.stages and isinstance(first, Stage1) and not first.given_weights


def cost_source(run: RunFiles) -> str:
    """Where the printed ratio comes from, or why there is none."""
    result = run.result
    reason = result.get(REASON)
    if result.get(RATIO) is not None:
        known = cost_words(result) if result.get(SOURCE) else "of an older version, which recorded no source"
        return f"{known} ({reason})" if reason else known
    if _is_end_to_end(run):
        return "1 by definition: the run is trained end to end"
    return f"none: {reason or 'the run is of an older version, which measured none'}"


def _lacks_stage1(run: RunFiles) -> bool:
    first = run.stages.get("stage1")
    return first is not None and bool(first.given_weights) and not isinstance(run.result.get(TERMS), dict)
