"""The feature cache of a recipe: where it lies, what its features depend on, and whether an existing one fits.

Cached features fit a run only where everything that they were made from is the same. Each view's manifest records that
as a key, field by field, and a view with another key is refused with the fields that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sfa_dist.data.batches import augment, rand_augment
from sfa_dist.data.features.feature_grid import StepGrid
from sfa_dist.data.features.feature_shards import read_manifest
from sfa_dist.data.features.feature_slices import CachedSteps
from sfa_dist.data.features.feature_stream import CachedSplit
from sfa_dist.data.shards.shard_index import SampleIndex
from sfa_dist.data.video.decode import decoder_of
from sfa_dist.errors import CheckpointError, RecipeError
from sfa_dist.models.footprint import trunk_dtype, trunk_eight_bits
from sfa_dist.models.frozen import tensors_sha256
from sfa_dist.models.vit import GELU, LAYER_NORM_EPS
from sfa_dist.models.vivit import dims_of
from sfa_dist.models.weights import read_state
from sfa_dist.recipe.blocks import CacheBlock
from sfa_dist.recipe.schema import Recipe, Stage2, StageBlock

FIELDS_SHOWN = 6
Key = dict[str, Any]


@dataclass(frozen=True)
class SplitPlan:
    """What the cache of one split has to be: its folder, source, number of views, and the `key` that they depend on.

    The augmentation's seed, `steps.seed`, is not in the key: a view is built with one seed, and a run with another seed
    may train from it.
    """

    folder: Path
    index: SampleIndex
    views: int
    steps: CachedSteps
    key: Key

    def view(self, number: int) -> Path:
        """The folder of a view."""
        return self.folder / f"view-{number:02d}"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of all views."""
        return tuple(self.view(number) for number in range(self.views))


@dataclass(frozen=True)
class FeatureCache:
    """A complete cache that fits the recipe; `trunk_sha256` is the `FrozenTrunk.sha256()` of the trunk that made it."""

    train: CachedSplit
    val: CachedSplit | None
    grid: StepGrid
    trunk_sha256: str


def cache_block(stage: StageBlock | None) -> CacheBlock:
    """The cache settings of stage 2. Raises RecipeError where the recipe has none."""
    if stage is None or stage.cache_block is None:
        raise RecipeError("the recipe has no feature cache: set stage2.cache.views (docs/cache.md)")
    return stage.cache_block


def trunk_weights_sha256(stage1: Path) -> str:
    """sha256 of the trunk's tensors in a stage-1 weights file; the tail's are left out."""
    state = read_state(stage1)
    return tensors_sha256({key: value for key, value in state.items() if key.startswith("trunk.")})


def plan_cache(
    recipe: Recipe, stage: Stage2, directory: Path, trunk: str, train: SampleIndex, val: SampleIndex | None
) -> tuple[SplitPlan, SplitPlan | None]:
    """The (training, validation) plans of the cache under `directory`; `trunk` is `trunk_weights_sha256`'s value."""
    cache = cache_block(stage)
    grid = StepGrid(stage.model.tubelet, stage.data.stride, cache.phases)
    views = CachedSteps(stage.data, stage.augment, grid, stage.model.image_size, recipe.seed)
    own = {**flat(stage.augment.model_dump(), "augment"), "phases": cache.phases}
    if stage.augment.rand_augment is not None:
        own["augment.rand_augment.revision"] = rand_augment.REVISION
    training = SplitPlan(directory / "train", train, cache.views, views, _key(stage, trunk, train) | own)
    if val is None:
        return training, None
    centre = replace(views, centre_frames=stage.frames)
    key = _key(stage, trunk, val) | {"frames": stage.frames}
    return training, SplitPlan(directory / f"val-{stage.frames}f", val, 1, centre, key)


def _key(stage: Stage2, trunk: str, index: SampleIndex) -> Key:
    """What cached features depend on, field by field."""
    model, data = stage.model, stage.data
    return {
        "trunk weights (sha256)": trunk,
        "clips (sha256)": index.sha256,
        **flat(vars(dims_of(model)), "model"),
        "model.pooling": model.pooling,
        "model.tubelet": model.tubelet,
        "model.image_size": model.image_size,
        # Older caches have the official values without recording them.
        **({"model.gelu": model.gelu} if model.gelu not in (None, GELU) else {}),
        **({"model.norm_eps": model.norm_eps} if model.norm_eps not in (None, LAYER_NORM_EPS) else {}),
        **({"model.positions": model.positions} if model.positions != "learned" else {}),
        "data.resize": data.resize,
        "data.stride": data.stride,
        "data.fps": data.fps or "its own",
        "data.mean": data.mean,
        "data.std": data.std,
        "augment.resize": stage.augment.resize,
        "augment.revision": augment.REVISION,
        "decoder": decoder_of(data).version,
        "dtype": _arithmetic(stage),
        "compile": stage.compile,
        "torch": torch.__version__,
    }


def _arithmetic(stage: Stage2) -> str:
    """The dtype that the trunk computes in, and the one that its weights are rounded to, if any."""
    dtype, eight_bits = str(trunk_dtype(stage)).removeprefix("torch."), trunk_eight_bits(stage)
    return dtype if eight_bits is None else f"{dtype}, linear layers in {eight_bits}"


def flat(values: Mapping[str, Any], prefix: str) -> Key:
    """{key: value} as {prefix.key: value}."""
    return {f"{prefix}.{key}": value for key, value in values.items()}


def refuse_other_key(folder: Path, recorded: Key, wanted: Key) -> None:
    """Raises RecipeError naming the fields in which a view's key differs from the recipe's."""
    different = [key for key in sorted(recorded.keys() | wanted.keys()) if recorded.get(key) != wanted.get(key)]
    if different:
        shown = "; ".join(
            f"{key}: cached {recorded.get(key)!r}, wanted {wanted.get(key)!r}" for key in different[:FIELDS_SHOWN]
        )
        more = f"; and {len(different) - FIELDS_SHOWN} more" if len(different) > FIELDS_SHOWN else ""
        raise RecipeError(
            f"the feature cache {folder} was made from something else ({shown}{more}); "
            "remove this one and run `sfa cache`, or set another stage2.cache.dir"
        )


def missing_views(plan: SplitPlan) -> list[int]:
    """The numbers of the views that are not complete. Raises RecipeError for complete views that do not fit."""
    missing = []
    for view in range(plan.views):
        manifest = read_manifest(plan.view(view))
        if manifest is None:
            missing.append(view)
        else:
            refuse_other_key(plan.view(view), manifest["key"], plan.key)
    return missing


def open_cache(stage: Stage2, train: SplitPlan, val: SplitPlan | None) -> FeatureCache:
    """The cache that stage 2 reads.

    Raises CheckpointError where it is incomplete, RecipeError where it does not fit the recipe.
    """
    plans = [train] if val is None else [train, val]
    for plan in plans:
        missing = missing_views(plan)
        if missing:
            have = plan.views - len(missing)
            raise CheckpointError(
                f"the feature cache {plan.folder} has {have} of {plan.views} views; run `sfa cache` with this recipe"
            )
    trunks = {(read_manifest(folder) or {})["trunk_sha256"] for plan in plans for folder in plan.folders}
    if len(trunks) > 1:
        raise RecipeError(
            f"the views under {train.folder.parent} were made by different trunks: remove them and run `sfa cache`"
        )
    width, dtype = dims_of(stage.model).width, trunk_dtype(stage)
    splits = [CachedSplit(plan.folders, width, dtype) for plan in plans]
    return FeatureCache(splits[0], splits[1] if val else None, train.steps.grid, trunks.pop())
