"""The blocks of a recipe, typed: each is one subject, and stands at the top level or inside a stage.

    model     the encoder and its adapter           trunk     how it runs, frozen, and the feature cache
    data      shards, and how clips are cut         augment   what becomes of clips
    training  batches, optimizer, engine, ...       run       test, log, stop
    base      the base class, plain values

No torch here.
"""

from sfa_dist.recipe.blocks.augment import AugmentBlock, MixupBlock, RandAugmentBlock, Resize
from sfa_dist.recipe.blocks.base import (
    Fixed,
    FolderName,
    Free,
    NonNegative,
    PathText,
    Positive,
    RecipeBlock,
    block_in,
    field_error,
    free_keys,
)
from sfa_dist.recipe.blocks.data import DataBlock, LimitsBlock, Rate, RemoteBlock, shard_kind
from sfa_dist.recipe.blocks.model import LABEL_HEADS, AdapterBlock, ModelBlock
from sfa_dist.recipe.blocks.run import LogBlock, StopBlock, TestBlock
from sfa_dist.recipe.blocks.training import BatchBlock, CheckpointBlock, EngineBlock, OptimizerBlock, ScheduleBlock
from sfa_dist.recipe.blocks.trunk import CacheBlock, FramesOrAuto

__all__ = [
    "LABEL_HEADS",
    "AdapterBlock",
    "AugmentBlock",
    "BatchBlock",
    "CacheBlock",
    "CheckpointBlock",
    "DataBlock",
    "EngineBlock",
    "Fixed",
    "FolderName",
    "FramesOrAuto",
    "Free",
    "LimitsBlock",
    "LogBlock",
    "MixupBlock",
    "ModelBlock",
    "NonNegative",
    "OptimizerBlock",
    "PathText",
    "Positive",
    "RandAugmentBlock",
    "Rate",
    "RecipeBlock",
    "RemoteBlock",
    "Resize",
    "ScheduleBlock",
    "StopBlock",
    "TestBlock",
    "block_in",
    "field_error",
    "free_keys",
    "shard_kind",
]
