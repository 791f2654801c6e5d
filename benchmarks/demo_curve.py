"""The picture in the README: validation top-1 of a finished demo over its seconds of training.

    make demo
    python benchmarks/demo_curve.py runs/demo docs/figures/demo.svg

Seconds are those of the optimizer steps, without evaluation and saving. The image stage has other classes and is left
out; stage 2 begins where stage 1 ends. The points are printed, with the machine that the run was on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common  # noqa: F401 (it puts the repository's root on the path)
import matplotlib as mpl
from matplotlib.figure import Figure

from sfa_dist.run.report.curves import SECONDS, stage_logs
from sfa_dist.run.report.document import Point
from sfa_dist.run.report.run_files import RunFiles, read_run

STAGES = {"stage1": "stage 1, 4 frames", "stage2": "stage 2, 16 frames, trunk frozen"}


def curves(run: RunFiles) -> dict[str, list[Point]]:
    """(seconds since stage 1 began, top-1) by stage."""
    found, begin = {}, 0.0
    logs = stage_logs(run)
    for name in STAGES:
        points = logs[name].points(logs[name].evaluations, lambda row: row.get("acc1"), SECONDS)
        found[name] = [(begin + second, score) for second, score in points]
        begin = found[name][-1][0]
    return found


def draw(run: RunFiles, out: Path) -> None:
    """Writes the figure as SVG with text as text."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.family": "sans-serif", "font.size": 11})
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for name, points in curves(run).items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=STAGES[name])
    shuffled = run.result["acc1_shuffled_frames"]
    axes.axhline(shuffled, color="0.4", linestyle="--", linewidth=1, label="test, frames in random order")
    axes.axhline(run.result["chance_acc1"], color="0.7", linestyle=":", linewidth=1.5, label="chance")
    axes.set(xlabel="seconds of training", ylabel="top-1", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.savefig(out, metadata={"Date": None, "Title": "Top-1 of the demo over seconds of training"})


def main() -> None:
    """Draws, and prints the points as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run directory of a finished demo")
    parser.add_argument("out", type=Path, help="the SVG file")
    arguments = parser.parse_args()
    run = read_run(arguments.run)
    draw(run, arguments.out)
    rank = run.env["ranks"][0]
    print(f"{len(run.env['ranks'])} ranks on {rank['device']}; test top-1 {run.result['acc1']:.4f}\n")
    print("| stage | seconds | top-1 |\n|---|---|---|")
    for name, points in curves(run).items():
        for second, score in points:
            print(f"| {name} | {second:.0f} | {score:.3f} |")


if __name__ == "__main__":
    main()
