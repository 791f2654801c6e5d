"""What the whole training costs: end to end on all frames, by SFA live, and by SFA from K cached views, equal epochs.

    python benchmarks/cost.py demo                              # runs them all on moving digits, with accuracy
    python benchmarks/cost.py demo --seeds 1 --epochs 2         # a try
    python benchmarks/cost.py project                           # B_32f, L_128f, H_96f, g_48f from measured parts
    python benchmarks/cost.py project --recipes b_32f --check   # and the parts beside a whole step

`demo` goes on where it was stopped; about 40 minutes of processor time in its usual size. Its clips have 48 frames, of
which stage 1 sees 4. `project` measures each part of a step (cost_projection.py says how) and adds up the recipe's
epochs. On a CPU all times are processor time.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict

import cost_demo
import cost_projection
import torch
from common import ROOT, Cell, add_options, report, script

from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.schema import load_recipe

RECIPES = ("b_32f", "l_128f", "h_96f", "g_48f")


def demo(arguments: argparse.Namespace) -> None:
    """Trains everything on the demo's data and prints the table."""
    a = arguments
    trained = cost_demo.demo_of(a)
    found = cost_demo.measure(trained, a.seeds, a.views)
    base = found["end to end"]
    rows: list[list[Cell]] = []
    for way, costs in found.items():
        cpu = [sum(cost.cpu.values()) for cost in costs]
        wall = [sum(cost.wall.values()) for cost in costs]
        ratios = [mine / sum(other.cpu.values()) for mine, other in zip(cpu, base, strict=True)]
        scores = [cost.acc1 for cost in costs if cost.acc1 is not None]
        deviation = statistics.stdev(scores) if len(scores) > 1 else None
        rows.append(
            [
                way,
                round(statistics.mean(cpu), 1),
                statistics.median(ratios),
                round(statistics.mean(wall), 1),
                round(statistics.mean(scores), 4),
                None if deviation is None else round(deviation, 4),
            ]
        )
    columns = ["training", "CPU seconds", "of end to end", "wall seconds", "top-1", "sd over seeds"]
    title = f"moving digits, {a.clips} clips of {a.frames} frames, {a.epochs} epochs in each stage, {a.seeds} seed(s)"
    told = {way: [asdict(cost) for cost in costs] for way, costs in found.items()}
    report(arguments, title, columns, rows, sizes=asdict(trained.sizes), costs=told)


def project(arguments: argparse.Namespace) -> None:
    """Measures the parts of each recipe's steps and prints the table."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows: list[list[Cell]] = []
    parts = {}
    for name in arguments.recipes:
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", arguments.set, environment()).recipe
        if arguments.check:
            composed, whole = cost_projection.check(recipe, device, arguments.rounds)
            rows.append([name, "stage 1, one clip, from parts / whole", 1000 * composed, composed / whole])
        measured = parts[name] = cost_projection.measure(recipe, device, arguments.rounds)
        seconds = cost_projection.training_seconds(recipe, measured, arguments.views)
        for way, own in seconds.items():
            rows.append([name, way, 1000 * own, own / seconds["end to end"]])
    columns = ["recipe", "training", "ms for each clip of the set", "of end to end"]
    title = f"projected from measured parts, bf16, {arguments.rounds} interleaved rounds; loading not counted"
    report(arguments, title, columns, rows, parts={name: asdict(each) for name, each in parts.items()})


def main() -> None:
    """Parses and runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("demo", help="train on moving digits, with accuracy")
    cost_demo.add_demo_options(run)
    run.set_defaults(work=demo)
    plan = commands.add_parser("project", help="put together from measured parts")
    plan.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    plan.add_argument("--set", action="append", default=[])
    plan.add_argument("--check", action="store_true", help="put parts beside a whole step of stage 1")
    plan.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    plan.set_defaults(work=project)
    for each in (run, plan):
        each.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    add_options(run, rounds=None)
    add_options(plan)
    arguments = parser.parse_args()
    arguments.work(arguments)


if __name__ == "__main__":
    script(main)
