"""Makes the frozen trunk and the trainable module ready to run: offload, chunk size, compiled blocks, activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sfa_dist.errors import RecipeError
from sfa_dist.models.assembly import largest_chunk, set_recompute
from sfa_dist.models.compiled import compile_blocks
from sfa_dist.models.footprint import offloads, peak_bytes, trunk_eight_bits
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.still import still_of, still_of_tubelets
from sfa_dist.parallel.engines.activation import treat_activations
from sfa_dist.parallel.engines.offload import HostLink
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import Stage2, StageBlock

FP8_SINCE = (8, 9)  # Compute capability.
# Share that a chunk may take: the first training step still has to allocate gradients and moments.
SHARE_OF_FREE_MEMORY = 0.25


def place_trunk(frozen: FrozenTrunk, stage: StageBlock, runtime: Runtime, recorded_chunk: int | None = None) -> str:
    """Moves `frozen` to the runtime's device and sets it up as the stage says; returns the settings as text.

    `recorded_chunk` is what `chunk_frames: auto` chose when the run began; a resumed run keeps it. Collective. Raises
    RecipeError for fp8 on a device without it.
    """
    assert isinstance(stage, Stage2), "only stage 2 has a frozen trunk"
    runtime.everywhere(lambda: require_units(stage, runtime.device))
    frozen.to(runtime.device)
    if stage.compile:
        frozen.compile_blocks()
    if offloads(stage):
        frozen.link = HostLink(runtime.device)
    frozen.chunk_frames = (
        stage.chunk_frames if stage.chunk_frames != "auto" else recorded_chunk or _agree(frozen, stage, runtime)
    )
    offload = "off" if frozen.link is None else "on, clips and trunk output stay in the host's memory"
    chosen = " (auto)" if stage.chunk_frames == "auto" else ""
    compiled = ", blocks compiled" if stage.compile else ""
    eight_bits = trunk_eight_bits(stage)
    compiled += "" if eight_bits is None else f", linear layers in {eight_bits}"
    return f"trunk: chunks of {frozen.chunk_frames} frames{chosen}; offload {offload}{compiled}"


def require_units(stage: StageBlock, device: torch.device) -> None:
    """Raises RecipeError where the trunk multiplies in fp8 and the device has no units for it."""
    if trunk_eight_bits(stage) != "fp8":
        return
    has = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_SINCE
    if not has:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise RecipeError(
            f"stage2.trunk_precision: fp8 needs a card that multiplies in fp8 (Ada, Hopper or newer), and this is "
            f"{name}: use int8 or bf16"
        )


def _agree(frozen: FrozenTrunk, stage: Stage2, runtime: Runtime) -> int:
    """The same chunk, in frames, on all ranks: that of the rank with the least free memory. Collective."""
    free = free_bytes(runtime.device)
    most = largest_chunk(frozen.trunk, runtime.device.type)
    own = chunk_that_fits(lambda tubelets: chunk_need(frozen, stage, tubelets), free, stage.model.tubelet, most)
    return min(runtime.gather(own))


def chunk_that_fits(need: Callable[[int], int], free: int, tubelet: int, most: int) -> int:
    """Frames of the largest chunk that fits into SHARE_OF_FREE_MEMORY of `free` bytes.

    Chunks have 1, 2, 4, ... tubelet steps, up to `most` frames. `need(tubelets)`, in bytes, is measured for one
    and for two, and extrapolated linearly. A chunk of one is always allowed.
    """
    one, two = need(1), need(2)
    tubelets = 1
    while 2 * tubelets * tubelet <= most:
        if one + (two - one) * (2 * tubelets - 1) > SHARE_OF_FREE_MEMORY * free:
            break
        tubelets *= 2
    return tubelets * tubelet


def chunk_need(frozen: FrozenTrunk, stage: Stage2, tubelets: int) -> int:
    """Peak bytes that a chunk of so many tubelet steps takes, pixels included, measured on black frames."""
    shape = (tubelets, 3, stage.model.tubelet, stage.model.image_size, stage.model.image_size)

    @torch.inference_mode()
    def work() -> object:
        pixels = torch.zeros(shape, dtype=torch.uint8, device=frozen.device)
        still = still_of_tubelets(still_of(pixels, stage.model.subtract), slice(0, tubelets), 1)
        return frozen.run_tubelets(pixels, still)

    work()  # The first run allocates what stays: workspaces, compiled code.
    return peak_bytes(work, frozen.device)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device in bytes; on a CPU, what the system can give without swapping."""
    if device.type == "cuda":
        # Memory that torch's allocator holds without using it is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable; set stage2.chunk_frames to a number")


def prepare_trainable(module: nn.Module, stage: StageBlock) -> list[str]:
    """Sets up the trainable module before an engine takes it; returns the settings as text, one line each.

    It compiles the blocks, sets what happens to their activations, and how the backward pass reads offloaded tokens.
    Raises RecipeError for settings that do not go together.
    """
    words = []
    if stage.compile:
        words.append(_compile_trained(module, stage))
    treat_activations(module, stage)
    if stage.activation != "keep":
        words.append(f"activations of the trained blocks: {stage.activation} ({stage.activation_backend})")
    how = set_recompute(module, stage)
    if how is not None:
        words.append(f"adapter: its backward pass reads the offloaded tokens again, chunk by chunk, {how}")
    return words


def _compile_trained(module: nn.Module, stage: StageBlock) -> str:
    """Compiles the trained blocks; returns a line that says so.

    Under ZeRO-3 a tail, a hundredth of the work, stays eager. Raises RecipeError there for a whole ViViT.
    """
    if stage.engine.zero_stage == 3:
        why = "ZeRO-3 gathers parameters in hooks inside a block, which cannot be compiled"
        if not stage.freezes_trunk:
            raise RecipeError(f"compile: {why}: use engine.zero: 2 or engine.name: fsdp, or compile: false")
        return f"trained blocks are not compiled: {why}"
    compile_blocks(module)
    return "trained blocks compiled"
