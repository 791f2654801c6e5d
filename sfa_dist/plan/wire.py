"""Bytes that a rank sends for one optimizer step: the traffic of the engines' collectives, as arithmetic.

Only what is trained is sent: the frozen trunk is the same on every rank. Collectives are counted as rings, the least
that any algorithm sends: for a tensor of V bytes on N ranks an all-gather or a reduce-scatter sends V (N - 1) / N, an
all-reduce twice that. Norms, losses and stop requests, a few hundred bytes, are left out. The calls of each engine are
counted on real ranks in tests/distributed/test_wire.py.
"""

from __future__ import annotations

from torch import nn

from sfa_dist.plan.engine_setting import Setting
from sfa_dist.plan.gathered_memory import ZERO3_REUSE, unit_sizes
from sfa_dist.plan.modules import shapes_of
from sfa_dist.recipe.schema import StageBlock

FP32 = 4


def wire_bytes(stage: StageBlock, world_size: int) -> int:
    """Bytes that one of `world_size` ranks sends in an optimizer step of `stage`, as a mean over the ranks.

    Raises RecipeError for a model that cannot be built.
    """
    setting = Setting(stage, world_size, stage.batch.accumulation(world_size))
    return round(sent_by_engine(shapes_of(stage).trainable, setting))


def sent_by_engine(module: nn.Module, setting: Setting) -> float:
    """The bytes of `wire_bytes` for a module under an engine, before rounding."""
    engine, micros = setting.stage.engine, setting.accumulation
    numel = sum(p.numel() for p in module.parameters())
    width = 2 if setting.bf16 else FP32
    one = width * numel * _share(setting.world)
    if setting.shards == 1:  # ZeRO 0 and `reduction: tree`: fp32 gradients, once a step.
        return 2 * FP32 * numel * _share(setting.world)
    if engine.uses_fsdp:
        return _sent_by_fsdp(unit_sizes(module), setting)
    if engine.zero_stage == 1:  # Gradients are all-reduced once, masters are stepped in shards, parameters gathered.
        return 2 * one + one
    if engine.zero_stage == 2:  # Gradients are all-reduced with each micro-batch.
        return 2 * one * micros + one
    return micros * (one + width * _gathered_by_zero3(numel, setting) * _share(setting.world))


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _gathered_by_zero3(numel: int, setting: Setting) -> int:
    """Elements gathered for a micro-batch: all of them for forward, and some of them again for backward.

    Those are the ones whose next use is beyond the reuse distance (a parameter at depth x from the end is needed again
    after 2 x elements).
    """
    block = setting.zero_block
    reuse = int(block.get("stage3_max_reuse_distance", ZERO3_REUSE))
    live = int(block.get("stage3_max_live_parameters", ZERO3_REUSE))
    return numel + max(0, numel - min(live, reuse // 2))


def _sent_by_fsdp(units: list[int], setting: Setting) -> float:
    """Bytes under FSDP2: blocks are gathered for forward and again for backward; the root stays gathered.

    Gradients are scattered in fp32 with the last micro-batch, and averaged over the copies of the state.
    """
    width = 2 if setting.bf16 else FP32
    copies = setting.world // setting.shards
    gathered = width * (units[0] + 2 * sum(units[1:])) * setting.accumulation
    scattered = FP32 * sum(units)
    between_copies = 2 * scattered / setting.shards * _share(copies)
    return (gathered + scattered) * _share(setting.shards) + between_copies
