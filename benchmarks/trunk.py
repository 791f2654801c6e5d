"""Speed of the frozen trunk and of a step of stage 1, as a share of what this device's matrix units do at best.

    python benchmarks/trunk.py                                       # S and B on a CPU; B, L, H and g on a GPU
    python benchmarks/trunk.py --sizes g --ways eager compiled --chunks 8 64 --frames 48

"At best" is a large bf16 matmul, timed in the same rounds. The work is counted from shapes (plan/flops.py): matrix
products alone, 2 FLOP a multiply-accumulate, so norms, GELU and softmax are time without work. All ways of a size run
in interleaved rounds; the table shows medians, and the shares are medians of ratios within a round. int8 and fp8 are
shares of the bf16 matmul too. Random weights and pixels. On a CPU one thread, and time is that of the process.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from common import add_options, interleave, median_ratio, medians, report, script, spread, weights_drawn_on

from sfa_dist.errors import RecipeError
from sfa_dist.models.loss import weighted_loss_sum
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.plan.flops import clip_flops, forward_macs
from sfa_dist.recipe.schema import Stage1, Stage2
from sfa_dist.stages.assemble import assemble_end_to_end, assemble_stage2
from sfa_dist.stages.trunk_setup import place_trunk, prepare_trainable, require_units

Work = Callable[[], object]
WAYS = ("eager", "compiled", "int8", "fp8")
SMALL: dict[str, dict[str, Any]] = {"S": {"size": "B", "width": 384, "heads": 6, "mlp": 1536}, "tiny": {"size": "tiny"}}
MATMUL = "bf16 matmul"


def stage_values(size: str, frames: int, batch: int, **keys: Any) -> dict[str, Any]:
    """A stage of a size (S is ViT-S) as plain values, bf16, AdamW, one micro-batch a step."""
    return {
        "frames": frames,
        "model": {**SMALL.get(size, {"size": size}), "classes": 400},
        "data": {"train": ["none"]},
        "batch": {"size": batch, "micro": batch},
        "optimizer": {"name": "adamw", "lr": 0.001},
        "schedule": {"epochs": 1},
        **keys,
    }


def matmul(device: torch.device, side: int) -> tuple[Work, float]:
    """A square bf16 product, and its FLOP."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    repeats = 10 if device.type == "cuda" else 1

    def work() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return work, 2.0 * side**3 * repeats


def trunk_way(way: str, size: str, arguments: argparse.Namespace, runtime: Runtime) -> dict[str, tuple[Work, float]]:
    """The trunk in one way, a case for each chunk; empty where the device cannot."""
    precision = {"precision": "bf16"}
    own = {"trunk_precision": way if way in ("int8", "fp8") else "bf16", "compile": way == "compiled"}
    stage = Stage2.model_validate(stage_values(size, arguments.frames, arguments.batch, engine=precision, **own))
    try:
        require_units(stage, runtime.device)
    except RecipeError as error:
        print(f"left out: {error}")
        return {}
    trunk = assemble_stage2(stage, None, "").frozen
    assert trunk is not None
    place_trunk(trunk, stage, runtime)
    side = stage.model.image_size
    clips = torch.randint(0, 256, (arguments.batch, 3, arguments.frames, side, side), dtype=torch.uint8)
    clips = clips.to(runtime.device)
    flops = 2.0 * forward_macs(stage.model, arguments.frames).trunk * arguments.batch

    def run(chunk: int) -> None:
        trunk.chunk_frames = chunk
        trunk(clips)

    most = arguments.batch * arguments.frames
    chunks = sorted({min(chunk, most) for chunk in arguments.chunks})
    return {f"trunk, {way}, chunks of {chunk}": (lambda chunk=chunk: run(chunk), flops) for chunk in chunks}  # type: ignore[misc]


def stage1_way(way: str, size: str, arguments: argparse.Namespace, runtime: Runtime) -> dict[str, tuple[Work, float]]:
    """A step of stage 1 on 8 frames, eager or compiled."""
    values = stage_values(size, 8, arguments.stage1_batch, engine={"precision": "bf16", "zero": 2})
    stage = Stage1.model_validate({**values, "compile": way == "compiled"}).on_ranks(runtime.world_size)
    model = assemble_end_to_end(stage, None).trainable
    prepare_trainable(model, stage)
    batch, side, device = arguments.stage1_batch, stage.model.image_size, runtime.device
    engine = make_engine(model, stage, 1, device)
    clips = torch.randint(0, 256, (batch, 3, stage.frames, side, side), dtype=torch.uint8).to(device)
    labels, weights = torch.arange(batch, device=device), torch.ones(batch, device=device)

    def step() -> None:
        loss = weighted_loss_sum(engine.forward(clips), labels, weights, 0.0) / batch
        engine.backward(loss, last=True)
        engine.step(1e-4)

    return {f"stage 1 step, {way}": (step, clip_flops(stage) * batch)}


def measure(size: str, arguments: argparse.Namespace, runtime: Runtime) -> tuple[list[list[Any]], dict[str, Any]]:
    """The rows of one size, and the raw seconds."""
    cases = {MATMUL: matmul(runtime.device, arguments.matmul)}
    for way in arguments.ways:
        cases |= trunk_way(way, size, arguments, runtime)
    if arguments.stage1_batch:
        for way in arguments.ways:
            if way in ("eager", "compiled"):
                cases |= stage1_way(way, size, arguments, runtime)
    seconds = interleave({name: work for name, (work, _) in cases.items()}, arguments.rounds)
    rate = {name: [flops / value for value in seconds[name]] for name, (_, flops) in cases.items()}
    rows = []
    for name, median in medians(seconds).items():
        share = median_ratio(rate[name], rate[MATMUL])
        flops = cases[name][1]
        rows.append([size, name, 1000 * median, flops / median / 1e12, share, f"{spread(seconds[name]):.0%}"])
    return rows, {size: seconds}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_card = torch.cuda.is_available()
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "S", "B", "L", "H", "g"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS) if on_card else ["eager", "int8"])
    parser.add_argument("--frames", type=int, default=64 if on_card else 8, help="of a clip that the trunk runs on")
    parser.add_argument("--batch", type=int, default=2 if on_card else 1, help="clips that the trunk runs on")
    parser.add_argument("--chunks", nargs="+", type=int, default=[8, 32, 128] if on_card else [2, 8])
    parser.add_argument("--stage1-batch", type=int, default=8 if on_card else 1, help="clips of a step; 0: no stage 1")
    parser.add_argument("--matmul", type=int, default=8192 if on_card else 2048, help="side of the matmul")
    add_options(parser)
    arguments = parser.parse_args()
    runtime = parallel_runtime.start(environment())
    if not on_card:
        torch.set_num_threads(1)
    rows: list[list[Any]] = []
    raw: dict[str, Any] = {}
    title = (
        f"Frozen trunk, {arguments.batch} x {arguments.frames} frames, and stage 1, {arguments.stage1_batch} x 8 frames"
        f"; medians of {arguments.rounds} interleaved rounds"
    )
    columns = ["size", "what", "ms", "TFLOP/s", f"of a {arguments.matmul} x {arguments.matmul} bf16 matmul", "spread"]
    sizes = arguments.sizes or (["B", "L", "H", "g"] if on_card else ["S", "B"])
    for size in sizes:
        with weights_drawn_on(runtime.device):
            found, seconds = measure(size, arguments, runtime)
        rows += found
        raw |= seconds
        report(arguments, title, columns, rows, whole=size == sizes[-1], seconds=raw)
        gc.collect()
        if on_card:
            torch.cuda.empty_cache()
    parallel_runtime.stop()


if __name__ == "__main__":
    script(main)
