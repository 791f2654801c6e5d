"""The output of `sfa plan`: a table with a column for each stage, and lines for the whole recipe."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from sfa_dist.plan.cards import BF16_SHARE, FP32_SHARE, GIB
from sfa_dist.plan.recipe_plan import CACHE, RecipePlan, StagePlan, categories_gib
from sfa_dist.plan.search import FRAMES_LIMIT
from sfa_dist.recipe.schema import Recipe


def print_plan(plan: RecipePlan, measured: bool) -> None:
    """Prints the plan; `measured` if the times of its steps were measured on this machine."""
    console = Console()
    card = plan.card
    console.print(
        f"{plan.recipe.name} on {plan.world_size} x {card.name} ({card.gib:g} GiB)", markup=False, highlight=False
    )
    table = Table(box=None, header_style="", pad_edge=False)
    table.add_column("")
    for stage in plan.stages:
        table.add_column(stage.name, justify="right")
    for label, cells in _rows(plan.stages):
        table.add_row(label, *cells)
    console.print(table, markup=False, highlight=False)
    whole = plan.as_json()
    lines = [f"checkpoints  {whole['checkpoint_gib']:.1f} GiB of disk at most"]
    if whole["cache_gib"] is not None:
        least = "" if plan.last.clips.video_frames else "at least "
        lines.append(f"cache        {least}{whole['cache_gib']:.1f} GiB {_cache_words(plan, whole['stage_hours'])}")
    if whole["gpu_hours"] is not None:
        lines.append(f"GPU-hours    {whole['gpu_hours']:.1f} of training ({_speed(plan, measured)})")
    if whole["cost_ratio"] is not None:
        lines.append(f"cost ratio   {whole['cost_ratio']:.2f} = {_ratio_words(plan.recipe)}")
    if whole["cost_ratio_why"] is not None:
        lines.append(f"above 1      {whole['cost_ratio_why']}")
    lines.append(f"clips        {plan.last.clips.source}")
    lines += [f"decoder      {need.name}: {need.memory.decode}" for need in plan.needs if need.memory.decode]
    lines += [f"advice       {line}" for line in whole["advice"]]
    lines.append("it fits" if plan.fits else "it does NOT fit")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _ratio_words(recipe: Recipe) -> str:
    """The two quantities of the cost ratio, in words."""
    first, second = recipe.stage1, recipe.stage2
    assert first is not None
    assert second is not None
    end_to_end = f"{second.schedule.epochs} epochs of {second.frames} frames end to end"
    parts = [] if first.weights else [f"{first.schedule.epochs} epochs of {first.frames} frames in stage 1"]
    parts += ["the feature cache"] * (second.cache is not None)
    parts += [f"{second.schedule.epochs} epochs of {second.frames} frames in stage 2"]
    text = f"operations of {' + '.join(parts)}, over those of {end_to_end}"
    if first.weights or first.schedule.epochs <= second.schedule.epochs:
        return text
    return f"{text}; a ratio of about one half assumes equal epochs"


def _cache_words(plan: RecipePlan, hours: dict[str, float | None]) -> str:
    stage = plan.last.stage
    if stage.cache_block is None:
        return "for one view of whole videos (stage2.cache.views: 1)"
    filled = "" if hours[CACHE] is None else f", filled in {hours[CACHE]:.1f} h, which the GPU-hours include"
    if plan.extraction:
        need = plan.extraction
        filled += f"; {need.needed_bytes / GIB:.2f} GiB a GPU meanwhile: {'fits' if need.fits else 'does NOT fit'}"
    return f"for {stage.cache_block.views} views{filled}"


def _rows(stages: list[StagePlan]) -> list[tuple[str, list[str]]]:
    decodes = any(plan.memory.decode for plan in stages)
    categories = [name for name in categories_gib(stages[0]) if decodes or name != "decoder"]
    together = any(len(plan.members) > 1 for plan in stages)
    return [
        ("frames", [str(plan.stage.frames) for plan in stages]),
        *([("members that train together", [str(len(plan.members)) for plan in stages])] if together else []),
        ("trained / frozen, millions", [_millions(plan) for plan in stages]),
        *((f"{name}, GiB", [f"{categories_gib(plan)[name]:.2f}" for plan in stages]) for name in categories),
        ("needed, GiB", [f"{plan.needed_bytes / GIB:.2f}" for plan in stages]),
        ("in the host's memory, GiB", [f"{plan.host_bytes / GIB:.2f}" for plan in stages]),
        ("fits", ["yes" if plan.fits else "NO" for plan in stages]),
        ("largest frames that fit", [_at_least(plan.max_frames, FRAMES_LIMIT) for plan in stages]),
        ("micro-batch / largest", [f"{plan.stage.batch.micro} / {plan.max_micro}" for plan in stages]),
        ("optimizer bytes a rank, GiB", [f"{plan.memory.optimizer_bytes_per_rank / GIB:.2f}" for plan in stages]),
        ("sent by a rank each step, GiB", [f"{plan.wire_bytes / GIB:.2f}" for plan in stages]),
        ("steps", [_number(plan.duration.steps, ",d") for plan in stages]),
        ("hours", [_number(plan.duration.hours, ".1f") for plan in stages]),
        ("hours of evaluation besides", [_number(plan.duration.evaluation_hours, ".1f") for plan in stages]),
    ]


def _millions(plan: StagePlan) -> str:
    return f"{plan.memory.trainable_parameters / 1e6:.1f} / {plan.memory.frozen_parameters / 1e6:.1f}"


def _at_least(value: int | None, ceiling: int) -> str:
    return f"{value} or more" if value == ceiling else str(value)


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _speed(plan: RecipePlan, measured: bool) -> str:
    if measured:
        return "measured here; without loading"
    assumed = {plan.card.sustained_tflops(stage.stage.engine.precision) or 0 for stage in plan.stages}
    share = f"{BF16_SHARE:.0%} of the card's bf16 peak, {FP32_SHARE:.0%} of its fp32 peak"
    return f"assumed {', '.join(f'{value:.0f}' for value in sorted(assumed))} TFLOP/s: {share}; without loading"
