"""A small tail trained for a few steps under any engine, with batches that do not depend on the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from whole_save import save_checkpoint

from sfa_dist import checkpoint as ckpt
from sfa_dist.models.loss import weighted_loss_sum
from sfa_dist.models.vivit import Tail, build
from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import Stage2

MODEL = {"size": "tiny", "classes": 5, "temporal_depth": 2, "width": 24, "heads": 3, "mlp": 33, "image_size": 16}
ENGINES: dict[str, dict[str, Any]] = {
    **{f"zero{number}": {"zero": number} for number in range(4)},
    "fsdp": {"name": "fsdp"},
    "tree": {"reduction": "tree"},
}
REPLICATED = ("zero0", "tree")
OFFLOADED: dict[str, dict[str, Any]] = {
    f"{name}-offload": {**ENGINES[name], "cpu_offload": True} for name in ("zero2", "zero3", "fsdp")
}
HYBRID = {"hybrid": {"name": "fsdp", "shard_ranks": 2}}
BATCH = 8
STEPS = 5


def make_stage(engine: str, precision: str, optimizer: str) -> Stage2:
    """A stage 2 of 24 x 3 features; the mlp of 33 and the 5 classes divide by no number of ranks."""
    return Stage2.model_validate(
        {
            "frames": 6,
            "model": MODEL,
            "data": {"train": ["x"]},
            "batch": {"size": BATCH, "micro": 2},
            "optimizer": {
                "name": optimizer,
                "lr": 0.05 if optimizer == "sgd" else 0.003,
                "weight_decay": 0.1,
                "clip_norm": 0.5,
            },
            "schedule": {"epochs": 1},
            "engine": {"precision": precision, **(ENGINES | OFFLOADED | HYBRID)[engine]},
        }
    )


def make_tail(stage: Stage2) -> Tail:
    """The same weights each time, with a head that is not zero."""
    torch.manual_seed(0)
    with torch.device("meta"):
        tail = Tail(stage.model, stage.frames, stage.adapter)
    build(tail)
    torch.nn.init.normal_(tail.head.weight, std=0.3)
    return tail


def accumulation(stage: Stage2, world_size: int) -> int:
    """Micro-batches of one rank in a step; the last may be padding in part."""
    return -(-stage.batch.size // (world_size * stage.batch.micro))


def start(runtime: Runtime, stage: Stage2, checkpoint: Path | None = None, step: int = 0) -> Engine:
    """An engine around a fresh tail, or around a checkpoint, as `prepare.prepare` makes it."""
    tail = make_tail(stage)
    if checkpoint is not None:
        tail.load_state_dict(ckpt.read_parameters(checkpoint))
    engine = make_engine(tail, stage, accumulation(stage, runtime.world_size), runtime.device)
    if checkpoint is not None:
        ckpt.load_engine(checkpoint, engine, step)
    return engine


def save(runtime: Runtime, engine: Engine, root: Path, step: int) -> Path:
    """A checkpoint of its own folder."""
    return save_checkpoint(root, step, engine, {"stage": "toy"}, runtime, keep=1)


def global_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(features, labels) of each step."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 3, 24, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def train(runtime: Runtime, engine: Engine, stage: Stage2, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step. Each rank takes its slots as the sample plan deals them, and the losses are
    added as the trainer adds them."""
    world, micro = runtime.world_size, stage.batch.micro
    parts = accumulation(stage, world)
    out = []
    for step in steps:
        features, labels = global_batches()[step]
        losses = []
        for part in range(parts):
            slots = (runtime.rank * parts + part) * micro + torch.arange(micro)
            weights = (slots < BATCH).float()
            slots = slots.clamp(max=BATCH - 1)
            loss = weighted_loss_sum(engine.forward(features[slots]), labels[slots], weights, 0.0)
            engine.backward(loss * (world * parts / BATCH), last=part == parts - 1)
            losses.append(loss.item())
        norm = engine.step(stage.optimizer.lr)
        out.append((math.fsum(loss for rank in runtime.gather(losses) for loss in rank) / BATCH, norm))
    return out
