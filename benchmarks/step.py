"""One optimizer step end to end, with the frozen trunk live, and from the feature cache: equal batch, same engine; and
the cached step as a plain PyTorch loop: autocast, clip_grad_norm_ and fused AdamW around the same module.

    python benchmarks/step.py                                     # ViT-B/16, 8 frames, on whatever machine this is
    python benchmarks/step.py --recipe recipes/l_128f.yaml --frames 128 --batch 8

Random weights and pixels; stage 1's block is trained end to end on `--frames` frames, stage 2's by SFA, all as they
run on one rank. Rounds are interleaved, the table shows medians, and the ratios are medians of ratios within a round,
to what has the same precision. On a CPU time is that of the process (other programs hardly count), on a GPU that of the
clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import add_options, interleave, median_ratio, medians, report, script, spread
from torch import Tensor, nn

from sfa_dist.models.footprint import trunk_dtype
from sfa_dist.models.loss import weighted_loss_sum
from sfa_dist.models.vivit import dims_of
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.recipe.schema import Recipe, Stage2, StageBlock, load_recipe
from sfa_dist.stages.assemble import assemble_end_to_end, assemble_stage2

END_TO_END, LIVE, CACHED, PLAIN = "end to end", "SFA live", "SFA cached", "cached, plain PyTorch"


def make_step(way: str, recipe: Recipe, batch: int, runtime: Runtime) -> Callable[[], None]:
    """A function that does one step in this way: stage 1's block end to end, stage 2's live or from features."""
    written = recipe.stage1 if way == END_TO_END else recipe.stage2
    assert written is not None
    stage = written.on_ranks(runtime.world_size)
    frames, size, device = stage.frames, stage.model.image_size, runtime.device
    clips = torch.randint(0, 256, (batch, 3, frames, size, size), dtype=torch.uint8, device=device)
    labels = torch.arange(batch, device=device) % stage.model.classes
    weights = torch.ones(batch, device=device)
    if not isinstance(stage, Stage2):
        parts, given = assemble_end_to_end(stage, None), lambda: clips
    elif way == LIVE:
        parts = assemble_stage2(stage, None, "")
        trunk = parts.frozen
        assert trunk is not None
        trunk.to(device)
        given = lambda: trunk(clips)  # noqa: E731
    else:
        parts = assemble_stage2(stage, None, "", cached_trunk="none")
        features = torch.randn(batch, frames // stage.model.tubelet, dims_of(stage.model).width, device=device)
        features = features.to(trunk_dtype(stage))
        given = lambda: features  # noqa: E731
    if way == PLAIN:
        return plain_step(parts.trainable.to(device), given(), labels, stage, runtime)
    engine = make_engine(parts.trainable, stage, 1, device)

    def step() -> None:
        logits: Tensor = engine.forward(given())
        engine.backward(weighted_loss_sum(logits, labels, weights, 0.0) / batch, last=True)
        engine.step(1e-3)
        runtime.synchronize()

    return step


def plain_step(
    module: nn.Module, features: Tensor, labels: Tensor, stage: StageBlock, runtime: Runtime
) -> Callable[[], None]:
    """The same step without an engine, as a user would write it."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    module.train()
    bf16 = stage.engine.precision == "bf16"

    def step() -> None:
        with torch.autocast(features.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(module(features), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), stage.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        runtime.synchronize()

    return step


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/b_32f.yaml"))
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--set", action="append", default=[])
    add_options(parser)
    arguments = parser.parse_args()
    runtime = parallel_runtime.start(environment())
    if runtime.device.type == "cpu":
        torch.set_num_threads(1)
    ways: dict[str, Callable[[], None]] = {}
    for precision in arguments.precision:
        own = [f"stage1.frames={arguments.frames}", f"stage2.frames={arguments.frames}", "stage1.image_checkpoint=null"]
        own += [f"batch={{size: {arguments.batch}, micro: {arguments.batch}}}", f"engine.precision={precision}"]
        own += ["optimizer.name=adamw", *arguments.set]
        recipe = load_recipe(arguments.recipe, own, environment()).recipe
        for way in (END_TO_END, LIVE, CACHED, PLAIN):
            ways[f"{way}, {precision}"] = make_step(way, recipe, arguments.batch, runtime)
    seconds = interleave(ways, arguments.rounds)
    rows = []
    for way, median in medians(seconds).items():
        kind, precision = way.rsplit(", ", 1)
        base, plain = seconds[f"{END_TO_END}, {precision}"], seconds[f"{PLAIN}, {precision}"]
        of_plain = median_ratio(seconds[way], plain) if kind in (CACHED, PLAIN) else None
        rows.append([way, 1000 * median, median_ratio(seconds[way], base), of_plain, f"{spread(seconds[way]):.0%}"])
    assert recipe.stage2 is not None
    engine = recipe.stage2.engine.title_of(recipe.stage2.on_ranks(runtime.world_size).engine)
    title = f"{recipe.name} with {arguments.frames} frames, batch {arguments.batch}, AdamW, {engine}"
    title += f"; medians of {arguments.rounds} interleaved rounds"
    report(arguments, title, ["step", "ms", "of end to end", "of plain PyTorch", "spread"], rows, seconds=seconds)
    parallel_runtime.stop()


if __name__ == "__main__":
    script(main)
