"""`sfa motion-prior`: trains a small trunk on generated clips, so that it knows motion."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from sfa_dist.errors import UsageError
from sfa_dist.recipe.blocks import ModelBlock
from sfa_dist.tools.working import working

_EPILOG = """\
examples:
  sfa motion-prior --out motion.safetensors
  sfa motion-prior --out motion.safetensors --seed 1 --steps 400 --json

A recipe starts from it with stage1.image_checkpoint: motion.safetensors. The one that comes with the package is
sfa:motion-tiny; docs/motion_prior.md describes it."""
LICENCE = "Apache-2.0"
STEPS = 30_000  # Of the weights that come with the package: about 24 CPU-minutes.
# The models of `--size`: a recipe that starts from one has the same trunk.
SIZES = {"motion-tiny": {"size": "tiny", "image_size": 32, "pooling": "gap"}}


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "motion-prior",
        help="train a small trunk on generated clips, so that it knows motion",
        description="Trains a small trunk on generated clips to predict where objects are and how they move, writes "
        "it as an image checkpoint, and prints how well it predicts on new clips.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    add("--size", choices=sorted(SIZES), default="motion-tiny", help="the model (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the weights and the clips (default: %(default)s)")
    add("--steps", type=int, default=STEPS, help="training steps, of 32 clips each (default: %(default)s)")
    add("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trains, writes and prints. Raises UsageError; CheckpointError where the file cannot be written."""
    if arguments.out.suffix != ".safetensors":
        raise UsageError(f"--out {arguments.out}: the name has to end with .safetensors")
    if arguments.out.exists():
        raise UsageError(f"--out {arguments.out} exists already: give another name, or remove it")
    if arguments.steps < 1 or arguments.seed < 0:
        raise UsageError("--steps has to be 1 or more, and --seed 0 or more")
    import torch  # Imported here: --help does not need it.

    from sfa_dist.checkpoint import write_weights
    from sfa_dist.tools.motion_training import PIXELS, held_out_r2, train_prior

    started = time.process_time()
    model = ModelBlock.model_validate({**SIZES[arguments.size], "classes": 2, "temporal_depth": 0})
    with working("making the first clips", arguments.json) as tell:
        regression = train_prior(model, arguments.seed, arguments.steps, tell)
    r2 = {name: round(value, 4) for name, value in held_out_r2(regression, arguments.seed, model.image_size).items()}
    command = f"sfa motion-prior --out FILE --size {arguments.size} --seed {arguments.seed} --steps {arguments.steps}"
    facts = {
        "command": command,
        "seed": str(arguments.seed),
        "steps": str(arguments.steps),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "held_out_r2": json.dumps(r2),
        "licence": LICENCE,
    }
    tensors = {f"trunk.{name}": value for name, value in regression.trunk.state_dict().items()}
    described = write_weights(
        arguments.out,
        tensors,
        {"model": model.model_dump_json(exclude_defaults=True), "pixels": json.dumps(PIXELS), **facts},
    )
    seconds = round(time.process_time() - started, 1)
    if arguments.json:
        print(json.dumps({"file": str(arguments.out), **described, "held_out_r2": r2, "cpu_seconds": seconds}))
        return 0
    print(f"{arguments.out}: {described['size']:,} bytes, sha256 {described['sha256']}, {seconds:g} CPU-seconds")
    print("R2 on new generated clips (1: all of the variance, 0: no more than the mean):")
    for name, value in r2.items():
        print(f"  {name:13}{value:6.3f}")
    return 0
