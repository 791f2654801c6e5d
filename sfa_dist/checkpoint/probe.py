"""The probe: one synthetic clip whose loss is stored in each checkpoint and computed again after loading.

The clip passes through the frozen trunk and the engine, so the loss shows what a file's hash cannot: a trunk, a library
or a device that computes something else from the same bytes. With the same engine, number of ranks, device and versions
the loss is the same bit for bit; otherwise it may differ by rounding, at most by `TOLERANCE`.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_dist.data.sampling.randomness import sample_rng
from sfa_dist.errors import CheckpointError
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import dims_of
from sfa_dist.parallel.engines.engine import Engine
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import StageBlock

# Relative to the loss, or to 1 if the loss is smaller: bf16 has 8 significant bits, TF32 on some GPUs has 11.
TOLERANCE = {"fp32": 2e-3, "bf16": 3e-2}
PACKAGES = ("torch", "deepspeed")


def probe_batch(stage: StageBlock, seed: int) -> tuple[Tensor, Tensor]:
    """A moving pattern drawn from the seed alone: clips (1, 3, T, S, S), uint8, and labels (1,), int64."""
    rng = sample_rng(seed, 0, 0, "probe")
    size = stage.model.image_size
    # Blocks of 1/7 of the frame: noise per pixel would average out within a patch.
    blocks = (rng.random((3, stage.frames, 7, 7)) * 256).astype(np.uint8)
    clip = F.interpolate(torch.from_numpy(blocks), size=(size, size), mode="nearest")
    return clip.unsqueeze(0), torch.tensor([int(rng.random() * stage.model.classes)])


@dataclass(frozen=True)
class Probe:
    """The engine's input, on the device: features of the probe's clip, or the clip itself if nothing is frozen.

    `labels` is (1,). The trunk runs once, when this is made: it is frozen, so its output is the same at each save.
    """

    inputs: Tensor
    labels: Tensor

    @classmethod
    def make(cls, stage: StageBlock, seed: int, frozen: FrozenTrunk | None, device: torch.device) -> Probe:
        """The probe of a stage. A stage 2 without its trunk takes pooled features; its probe has random ones."""
        clips, labels = probe_batch(stage, seed)
        inputs = clips.to(device)
        if frozen is not None:
            inputs = frozen(inputs)
        elif stage.freezes_trunk:
            shape = (1, stage.frames // stage.model.tubelet, dims_of(stage.model).width)
            inputs = torch.from_numpy(sample_rng(seed, 0, 0, "probe").random(shape)).float().to(device)
        return cls(inputs, labels.to(device))

    def loss(self, engine: Engine) -> float:
        """Cross-entropy with the engine's present weights. Collective: sharded weights need all ranks."""
        return float(F.cross_entropy(engine.evaluate(self.inputs), self.labels))


def platform_of(stage: StageBlock, runtime: Runtime) -> dict[str, Any]:
    """What the last bits of a loss depend on, besides the weights; recorded as `place` in `state.json`."""
    on_gpu = runtime.device.type == "cuda"
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "engine": stage.engine.model_dump(),
        "ranks": runtime.world_size,
        "device": torch.cuda.get_device_name(runtime.device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "chunk_frames": getattr(stage, "chunk_frames", None),
        **versions,
        **(_cuda_versions() if on_gpu else {}),
    }


def _cuda_versions() -> dict[str, str]:
    """What chooses the kernels of a GPU besides torch: an update of it may change the last bits."""
    driver = Path("/proc/driver/nvidia/version")
    return {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else "",
    }


def place_changes(recorded: dict[str, Any], platform: dict[str, Any]) -> list[str]:
    """What of a checkpoint's `place` is not so any more, in words: `engine.zero was 2 and is 0`."""
    flat = {**recorded, **{f"engine.{key}": value for key, value in recorded["engine"].items()}}
    now = {**platform, **{f"engine.{key}": value for key, value in platform["engine"].items()}}
    keys = [key for key in now if key != "engine" and (key not in flat or flat[key] != now[key])]
    return [f"{key} was {flat.get(key, 'not recorded')} and is {now[key]}" for key in keys]


def check_probe(recorded: dict[str, Any], loss: float, platform: dict[str, Any], checkpoint: str) -> None:
    """Raises CheckpointError if a loaded checkpoint gives another loss than when it was saved.

    `recorded` is the probe in `state.json`, with the keys `loss` and `place`: the platform it was computed on.
    """
    same_platform = recorded["place"] == platform
    precisions = (recorded["place"]["engine"]["precision"], platform["engine"]["precision"])
    allowed = 0.0 if same_platform else max(TOLERANCE[p] for p in precisions) * max(1.0, abs(recorded["loss"]))
    if not abs(loss - recorded["loss"]) <= allowed:
        how = "the same engine, ranks, device and versions" if same_platform else f"within {allowed:.2g}"
        raise CheckpointError(
            f"{checkpoint} computes something else than when it was saved: the loss of its probe was "
            f"{recorded['loss']!r} and is {loss!r}, wanted {'bit for bit on ' + how if same_platform else how}; "
            "weights, library or device are not what they were: take an older checkpoint with --resume PATH"
        )
