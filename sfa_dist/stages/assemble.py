"""Which module a stage trains, which it freezes, and where their weights come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfa_dist.boundary.disk import parse_json
from sfa_dist.checkpoint import write_weights
from sfa_dist.data.shards.shard_index import ClassNames
from sfa_dist.errors import RecipeError
from sfa_dist.models.assembly import freeze, tail_of, trunk_of, whole_model
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.image_function import function_of_own, refuse_other_centring
from sfa_dist.models.image_vit import Loaded, load_image_vit
from sfa_dist.models.vivit import Tail, Trunk, ViViT, build
from sfa_dist.models.weights import (
    fit_time_positions,
    load_exactly,
    load_stage1_into_tail,
    load_trunk,
    read_state,
)
from sfa_dist.models.weights_file import read_metadata
from sfa_dist.recipe.blocks import ModelBlock
from sfa_dist.recipe.schema import Stage2, StageBlock


@dataclass
class Parts:
    """The module that the engine trains, and the frozen trunk in front of it (None where everything is trained).

    Where the trunk's features come from a cache, `cached` is the trunk's (sha256, number of parameters). `loaded`
    describes what was loaded from an image checkpoint.
    """

    trainable: nn.Module
    frozen: FrozenTrunk | None
    cached: tuple[str, int] | None = None
    loaded: Loaded | None = None

    def parameters(self) -> tuple[int, int]:
        """(trainable, frozen) parameter counts."""
        frozen = sum(p.numel() for p in self.frozen.parameters()) if self.frozen else 0
        return sum(p.numel() for p in self.trainable.parameters()), self.cached[1] if self.cached else frozen

    def trunk_sha256(self) -> str | None:
        """sha256 of the frozen trunk, run or cached; None where everything is trained."""
        if self.cached:
            return self.cached[0]
        return self.frozen.sha256() if self.frozen else None


def assemble_end_to_end(stage: StageBlock, image_checkpoint: str | None) -> Parts:
    """The whole ViViT, trainable; its trunk is loaded from an image checkpoint where one is given."""
    model = whole_model(stage)
    build(model)
    loaded = None
    if image_checkpoint is not None:
        loaded = load_image_vit(model.trunk, image_checkpoint, (stage.data.mean, stage.data.std))
    return Parts(model, None, loaded=loaded)


def assemble_stage2(stage: Stage2, stage1: Path | None, classes: str, cached_trunk: str | None = None) -> Parts:
    """The frozen trunk and the trainable tail, both from stage 1's weights (None: random, for measurements).

    `classes` identifies the class list of the data; the class head is kept where stage 1 had the same one. Where cached
    features are read, `cached_trunk` is their trunk's sha256, and the trunk is not built.
    """
    trunk, tail = trunk_of(stage), tail_of(stage)
    state = read_state(stage1) if stage1 else None
    if stage1 is not None:
        refuse_other_centring(stage.model, stage1)
    if cached_trunk is not None:
        parts = Parts(tail, None, (cached_trunk, trunk_parameters(stage)))
    else:
        # The trunk becomes bf16 before the tail takes memory: the two are never in fp32 at the same time.
        parts = Parts(tail, _built_frozen(trunk, stage, state, stage1, pooled=not tail.takes_tokens))
    build(tail)
    if state is not None and stage1 is not None:
        keep_head = stage.head == "auto" and read_metadata(stage1).get("classes") == classes
        load_stage1_into_tail(tail, state, keep_head, str(stage1))
    return parts


def assemble_unfrozen(stage: Stage2, stage1: Path | None, classes: str) -> Parts:
    """The whole model of a stage 2 that freezes nothing, from stage 1's weights; else as `assemble_stage2`."""
    parts = assemble_end_to_end(stage, None)
    if stage1 is not None:
        assert isinstance(parts.trainable, ViViT)
        refuse_other_centring(stage.model, stage1)
        _refuse_other_trunk(parts.trainable.trunk, stage, stage1)
        state = read_state(stage1)
        load_trunk(parts.trainable.trunk, state, str(stage1))
        keep_head = stage.head == "auto" and read_metadata(stage1).get("classes") == classes
        load_stage1_into_tail(parts.trainable.tail, state, keep_head, str(stage1))
    return parts


def trunk_parameters(stage: StageBlock) -> int:
    """Number of parameters of the trunk, without allocating them."""
    return sum(p.numel() for p in trunk_of(stage).parameters())


def assemble_trunk(stage: Stage2, stage1: Path, pooled: bool = True) -> FrozenTrunk:
    """The frozen trunk of stage 2 from stage 1's weights, without the tail: it fills the feature cache."""
    return _built_frozen(trunk_of(stage), stage, read_state(stage1), stage1, pooled)


def _built_frozen(
    trunk: Trunk, stage: Stage2, state: Mapping[str, Tensor] | None, source: Path | None, pooled: bool
) -> FrozenTrunk:
    # The trunk's random weights must not shift the tail's, which are the same whether the trunk is built or not.
    with torch.random.fork_rng(devices=[]):
        build(trunk)
    if state is not None and source is not None:
        _refuse_other_trunk(trunk, stage, source)
        load_trunk(trunk, state, str(source))
    return freeze(trunk, stage, pooled)


def _refuse_other_trunk(trunk: Trunk, stage: StageBlock, source: Path) -> None:
    function = function_of_own(source)
    if function is not None:
        function.refuse_other(trunk, (stage.data.mean, stage.data.std), str(source))


def save_final(
    path: Path, parts: Parts, parameters: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a stage's final weights in fp32; returns the file's `size` and `sha256`.

    A frozen trunk is not written; its hash goes into the metadata (`trunk_sha256`). Raises CheckpointError.
    """
    trunk = parts.trunk_sha256()
    prefix = "tail." if trunk else ""
    extra = {"trunk_sha256": trunk} if trunk else {}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in {**metadata, **extra}.items()}
    return write_weights(path, {prefix + name: tensor for name, tensor in parameters.items()}, text)


def metadata_value(path: Path, key: str) -> Any:
    """The JSON value of a key in a weights file's metadata; None where it is absent or, in foreign files, not JSON."""
    try:
        return parse_json(read_metadata(path).get(key, "null").encode())
    except ValueError:
        return None


def load_for_test(stage: StageBlock, weights: Path, trunk_weights: Path | None, any_frames: bool = False) -> Parts:
    """A finished stage's model for evaluation, in the engine's precision.

    For stage 2 the trunk comes from stage 1's file, `trunk_weights`. With `any_frames` the stage may have another
    number of frames than in training; its temporal positions are interpolated. Raises RecipeError where stage 2 was
    trained on another trunk.
    """
    if not isinstance(stage, Stage2) or not stage.freeze_trunk:
        parts = assemble_end_to_end(stage, None)
        assert isinstance(parts.trainable, ViViT)
        _refuse_other_trunk(parts.trainable.trunk, stage, weights)
        refuse_other_centring(stage.model, weights)
        state = read_state(weights)
        state = fit_time_positions(state, parts.trainable.tail, "tail.") if any_frames else state
        load_exactly(parts.trainable, state, str(weights))
    else:
        parts = assemble_stage2(stage, trunk_weights, classes="")
        _load_tail(parts.trainable, stage, weights, any_frames)
        expected = read_metadata(weights).get("trunk_sha256")
        if parts.frozen is not None and parts.frozen.sha256() != expected:
            raise RecipeError(f"{weights} was trained on another trunk than that of {trunk_weights}")
    _make_ready(parts.trainable, stage)
    return parts


def trained_classes(path: Path) -> ClassNames | None:
    """The class names in the metadata of a weights file; None where it has none."""
    names = metadata_value(path, "classes")
    known = isinstance(names, list) or (isinstance(names, dict) and all(isinstance(n, list) for n in names.values()))
    return names if known else None


def load_tail_for_test(stage: Stage2, weights: Path, trunk_sha256: str) -> nn.Module:
    """The tail of a finished stage 2 for evaluation; raises RecipeError where it was trained on another trunk."""
    tail = assemble_stage2(stage, None, classes="", cached_trunk=trunk_sha256).trainable
    _load_tail(tail, stage, weights)
    if read_metadata(weights).get("trunk_sha256") != trunk_sha256:
        raise RecipeError(f"{weights} was trained on another trunk than that of stage 1")
    _make_ready(tail, stage)
    return tail


def _load_tail(tail: nn.Module, stage: Stage2, weights: Path, any_frames: bool = False) -> None:
    refuse_other_centring(stage.model, weights)
    state: Mapping[str, Tensor] = {key.removeprefix("tail."): value for key, value in read_state(weights).items()}
    if any_frames and isinstance(tail, Tail):
        state = fit_time_positions(state, tail)
    load_exactly(tail, state, str(weights))


def _make_ready(module: nn.Module, stage: StageBlock) -> None:
    dtype = torch.bfloat16 if stage.engine.precision == "bf16" else torch.float32
    module.to(dtype).eval().requires_grad_(False)


def classes_id(names: ClassNames | None, model: ModelBlock) -> str:
    """The JSON text that identifies the classes in weights metadata.

    It is the names in order, by head where there are several, or the numbers of classes where there are no names.
    """
    return json.dumps(names or model.class_heads or model.classes)
