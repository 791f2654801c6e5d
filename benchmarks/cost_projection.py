"""The whole training of a recipe, put together from measured parts of its steps: for models whose full step, or whose
weeks of training, this machine cannot run.

A trunk is its embedding and `depth` equal blocks, a tail its ends and `temporal_depth` equal blocks, so each is
measured at one and at two blocks, at full width, tokens and micro-batch; the difference is a block, and the rest
follows. An optimizer's step costs the same for every parameter, so it is measured on a few million. `check` puts the
parts of a model that fits beside a whole step of it. Not counted: loading, decoding, communication, evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import interleave, medians
from torch import Tensor, nn

from sfa_dist.models.vivit import Tail, Trunk, ViViT, build, dims_of
from sfa_dist.parallel.engines.optimizers import make_optimizer
from sfa_dist.plan.dataset import count_clips
from sfa_dist.plan.feature_cache_plan import clips_in_a_view
from sfa_dist.recipe.blocks import AdapterBlock, ModelBlock
from sfa_dist.recipe.schema import Recipe, Stage2, StageBlock

ROWS = 2  # Tubelet steps that a measured trunk takes at a time.
OPTIMIZED = 8 * 2**20  # Parameters that a measured optimizer steps.
DEPTHS = (1, 2)


@dataclass(frozen=True)
class Parts:
    """Seconds: of one tubelet step through the trunk, frozen and trained; of one clip through the tail, trained, in
    stage 1 and stage 2; of the optimizer for one clip of the global batch, for all parameters and for the tail's."""

    frozen_step: float
    trained_step: float
    tail1: float
    tail2: float
    optimizer_all: float
    optimizer_tail: float

    def end_to_end(self, frames: int, tubelet: int, tail: float) -> float:
        """One clip of end-to-end training."""
        return frames // tubelet * self.trained_step + tail + self.optimizer_all

    @property
    def cached(self) -> float:
        """One clip of stage 2 whose features are read."""
        return self.tail2 + self.optimizer_tail


def both_stages(recipe: Recipe) -> tuple[StageBlock, Stage2]:
    """The recipe's stages 1 and 2."""
    assert recipe.stage1 is not None, f"{recipe.name} has no stage1"
    assert recipe.stage2 is not None, f"{recipe.name} has no stage2"
    return recipe.stage1, recipe.stage2


def measure(recipe: Recipe, device: torch.device, rounds: int) -> Parts:
    """The parts of a recipe's steps on this device, in bf16, as medians of interleaved rounds."""
    first, second = both_stages(recipe)
    model = second.model
    cases: dict[tuple[str, int], Callable[[], object]] = {}
    for depth in DEPTHS:
        shallow = model.model_copy(update={"depth": depth, "temporal_depth": depth, "drop_path": 0.0})
        trunk, pixels = make_trunk(shallow, device)
        cases["frozen", depth] = lambda trunk=trunk, pixels=pixels: forward(trunk, pixels)
        cases["trained", depth] = lambda trunk=trunk, pixels=pixels: trunk.forward_tubelets(pixels).sum().backward()
        cases["tail1", depth] = make_tail(shallow, first.frames, None, first.batch.micro, device)
        cases["tail2", depth] = make_tail(shallow, second.frames, second.adapter, second.batch.micro, device)
    cases["optimizer", 0] = make_step(second, device)
    found = medians(interleave(cases, rounds))
    spatial = dims_of(model).depth
    parameters = {name: count(model, second, name) for name in ("all", "tail")}
    stepped = found["optimizer", 0] / OPTIMIZED / second.batch.size

    def at(name: str, depth: int) -> float:
        one, two = found[name, 1], found[name, 2]
        return one + (two - one) * (depth - 1)

    return Parts(
        frozen_step=at("frozen", spatial) / ROWS,
        trained_step=at("trained", spatial) / ROWS,
        tail1=at("tail1", model.temporal_depth) / first.batch.micro,
        tail2=at("tail2", model.temporal_depth) / second.batch.micro,
        optimizer_all=stepped * parameters["all"],
        optimizer_tail=stepped * parameters["tail"],
    )


def make_trunk(model: ModelBlock, device: torch.device) -> tuple[Trunk, Tensor]:
    """A trunk in bf16 and normalised pixels for it."""
    with torch.device("meta"):
        trunk = Trunk(model)
    build(trunk, device)
    shape = (ROWS, 3, model.tubelet, model.image_size, model.image_size)
    return trunk.to(torch.bfloat16), torch.randn(shape, device=device, dtype=torch.bfloat16)


@torch.inference_mode()
def forward(trunk: Trunk, pixels: Tensor) -> Tensor:
    """What a frozen trunk does."""
    return trunk.forward_tubelets(pixels)


def make_tail(
    model: ModelBlock, frames: int, adapter: AdapterBlock | None, clips: int, device: torch.device
) -> Callable[[], object]:
    """Forward and backward of `clips` clips through a tail in bf16. Its features ask for no gradients: those that stage
    1 passes on to its trunk are a few vectors."""
    with torch.device("meta"):
        tail = Tail(model, frames, adapter)
    build(tail, device).to(torch.bfloat16)
    shape = (clips, frames // model.tubelet, dims_of(model).width)
    features = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return lambda: tail(features).sum().backward()


def make_step(stage: StageBlock, device: torch.device) -> Callable[[], object]:
    """A step of the stage's optimizer on fp32 master weights."""
    weight = nn.Parameter(torch.zeros(OPTIMIZED // 1024, 1024, device=device))
    weight.grad = torch.ones_like(weight)
    return make_optimizer({"weight": weight}, stage.optimizer).step


def count(model: ModelBlock, stage: Stage2, what: str) -> int:
    """Parameters of the whole end-to-end model, or of stage 2's tail."""
    with torch.device("meta"):
        module = ViViT(model, stage.frames) if what == "all" else Tail(model, stage.frames, stage.adapter)
    return sum(p.numel() for p in module.parameters())


def training_seconds(recipe: Recipe, parts: Parts, views: list[int]) -> dict[str, float]:
    """Seconds that the whole training takes for each clip of the training set, by way."""
    first, second = both_stages(recipe)
    tubelet, clips = second.model.tubelet, count_clips(second, None)
    trunk = second.frames // tubelet * parts.frozen_step
    stage1 = first.schedule.epochs * parts.end_to_end(first.frames, tubelet, parts.tail1)
    epochs = second.schedule.epochs
    found = {
        "end to end": epochs * parts.end_to_end(second.frames, tubelet, parts.tail2),
        "SFA live": stage1 + epochs * (trunk + parts.cached),
    }
    validation = (clips.val or 0) / (clips.train or 1)
    for k in views:
        extraction = trunk * (k * clips_in_a_view(second, clips) + validation)
        found[f"SFA cached, K = {k}"] = stage1 + extraction + epochs * parts.cached
    return found


def check(recipe: Recipe, device: torch.device, rounds: int) -> tuple[float, float]:
    """Seconds of one clip of stage 1 end to end, forward and backward: from parts, and of the whole model."""
    first, _ = both_stages(recipe)
    parts = measure(recipe, device, rounds)
    with torch.device("meta"):
        model = ViViT(first.model.model_copy(update={"drop_path": 0.0}), first.frames)
    build(model, device).to(torch.bfloat16)
    size = first.model.image_size
    clip = torch.randint(0, 256, (1, 3, first.frames, size, size), dtype=torch.uint8, device=device)
    whole = medians(interleave({"whole": lambda: model(clip).sum().backward()}, rounds))["whole"]
    return parts.end_to_end(first.frames, first.model.tubelet, parts.tail1) - parts.optimizer_all, whole
