"""The options of a training run, on the command line of `train.py`, `sfa train` and `sfa cache`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sfa_dist.recipe.stage_names import RUN_STEPS

DESCRIPTION = """\
Trains a recipe into a run directory: its stages in order, then the test and the report. The same command continues a
run that was stopped.

  deepspeed sfa_dist/train.py --recipe recipes/h_96f.yaml
  torchrun --nproc-per-node 8 sfa_dist/train.py --recipe recipes/h_96f.yaml
  srun python sfa_dist/train.py --recipe recipes/g_48f.yaml
  python sfa_dist/train.py --recipe recipes/demo.yaml --set stage2.schedule.epochs=2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a training run to `parser`."""
    parser.add_argument("--recipe", required=True, type=Path, help="the YAML file that describes the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. stage2.optimizer.lr=0.05"
    )
    parser.add_argument("--run-dir", type=Path, help="the run directory (default: runs/<recipe name>)")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: continue the run in the run directory, if any; never: refuse a directory that holds a run; "
        "or the checkpoint to resume from (default: auto)",
    )
    parser.add_argument("--stage", choices=RUN_STEPS, help="run only this stage")
    parser.add_argument(
        "--print-recipe", action="store_true", help="print the resolved recipe with the origin of each value, and exit"
    )
    parser.add_argument("--dry-run", action="store_true", help="build and check everything, but run no step")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
