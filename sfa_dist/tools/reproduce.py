"""`sfa reproduce`: trains the rows of one of the paper's tables or figures and prints them beside the paper's."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfa_dist.errors import UsageError
from sfa_dist.parallel.environment import environment
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.tools.experiments.rows import EXPERIMENTS, Experiment
from sfa_dist.tools.experiments.scales import OTHER, SCALES, LeftOutError, Scale, SmallScale, find_scale
from sfa_dist.tools.experiments.steps import Step, steps_of

if TYPE_CHECKING:
    from sfa_dist.tools.experiments.results import Found

TABLE4 = "table4"
KINDS = ("table", "fig", "")  # In this order.
NAMES = sorted([*EXPERIMENTS, TABLE4], key=lambda name: ([name.startswith(kind) for kind in KINDS].index(True), name))
RUNS = Path("runs") / "reproduce"
_EPILOG = f"""\
examples:
  sfa reproduce table1 --scale quick --seeds 1
  sfa reproduce table1 --scale demo --seeds 3 --out docs/results
  sfa reproduce table5 --scale kinetics400 --seeds 1 --slurm > jobs.sh; bash jobs.sh --nodes 2
  sfa reproduce table4

scales: {", ".join(SCALES)}
demo and quick make their own clips; a data set takes the recipes that are shipped for it, and shards in $SFA_DATA.
The same command continues what was stopped. Each run has its run directory in {RUNS}/. table4 trains
nothing: the planner computes it. docs/reproduce.md says what each name runs, and what it costs."""

Plan = dict[str, dict[int, tuple[Step, ...]]]  # The steps of each row, by seed.


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "reproduce",
        help="train the rows of one of the paper's tables or figures",
        description="Trains the rows of one of the paper's tables or figures at a scale, one run after another, and "
        "prints them beside the paper's numbers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", metavar="NAME", help=", ".join(NAMES))
    add("--scale", help="demo, quick or a data set (default: demo)")
    add("--seeds", type=int, metavar="N", help="train each row with the seeds 0 to N-1 (default: 3)")
    add("--ranks", type=int, help="ranks of each run on this machine (default: one for each GPU; without one, two)")
    add("--out", type=Path, metavar="FOLDER", help="folder of NAME.json, .md and .png (default: results/SCALE)")
    add("--slurm", action="store_true", help="print a script that submits the runs as Slurm jobs, and run nothing")
    add("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    add("--debug", action="store_true", help="print tracebacks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Trains what is missing, writes and prints.

    Raises UsageError for a wrong command line, PreemptedError on a stop request, RunFailedError where a run fails.
    """
    if arguments.name not in NAMES:
        raise UsageError(f"there is no {arguments.name}: there are {', '.join(NAMES)}")
    if arguments.name == TABLE4:
        _table4(arguments)
        return
    scale, seeds = find_scale(arguments.scale or "demo"), 3 if arguments.seeds is None else arguments.seeds
    if seeds < 1 or (arguments.ranks is not None and arguments.ranks < 1):
        raise UsageError("--seeds and --ranks have to be 1 or more")
    if isinstance(scale, SmallScale) and find_spec("sklearn") is None:
        raise UsageError(f"the clips of --scale {scale.name} are made from scikit-learn's digits: install scikit-learn")
    environ = environment()
    experiment = EXPERIMENTS[arguments.name]
    plan, left_out = plan_of(experiment, scale, range(seeds), environ)
    command = shlex.join(["sfa", *sys.argv[1:]])
    if arguments.slurm:
        _make_clips(experiment, scale, StopFlag(), environ)
        _print_jobs(experiment, plan, command, environ)
        return
    out = arguments.out or Path("results") / scale.name
    stop = StopFlag()
    stop.install()
    _make_clips(experiment, scale, stop, environ)
    _train(experiment, scale, plan, left_out, arguments, (out, command, stop, environ))


def plan_of(
    experiment: Experiment, scale: Scale, seeds: Iterable[int], environ: Mapping[str, str], runs: Path = RUNS
) -> tuple[Plan, dict[str, str]]:
    """The steps of each row and seed, and why the other rows are left out. Raises UsageError where all are."""
    plan: Plan = {}
    left_out = {row.name: row.left_out for row in experiment.rows if row.left_out}
    directory, shared = runs_of(experiment, scale, runs), runs / "shared"
    for number, row in enumerate(experiment.rows):
        if row.training is None:
            continue
        try:
            resolved = scale.resolve(row.training)
        except LeftOutError as error:
            left_out[row.name] = str(error)
            continue
        folder = directory / folder_name(number, row.name)
        plan[row.name] = {seed: steps_of(resolved, seed, folder / f"seed-{seed}", shared, environ) for seed in seeds}
    if not plan:
        why = "; ".join(dict.fromkeys(left_out.values()))
        raise UsageError(f"--scale {scale.name}: none of the rows of {experiment.name} are there: {why}")
    return plan, left_out


def runs_of(experiment: Experiment, scale: Scale, runs: Path = RUNS) -> Path:
    """The folder of an experiment's rows."""
    return runs / f"{experiment.name}_{scale.name}"


def further_seeds(experiment: Experiment, scale: Scale, asked: Iterable[int], runs: Path = RUNS) -> list[int]:
    """The seeds beside those asked for that a row has a folder of."""
    named = (folder.name.removeprefix("seed-") for folder in runs_of(experiment, scale, runs).glob("*/seed-*"))
    return sorted({int(name) for name in named if name.isdecimal()} - set(asked))


def folder_name(number: int, name: str) -> str:
    """The folder of a row's runs: its place in the table, and what its name has of letters and digits."""
    words = "".join(letter if letter.isalnum() else " " for letter in name).split()
    return "_".join([f"{number:02d}", *words])


def _make_clips(experiment: Experiment, scale: Scale, stop: StopFlag, environ: Mapping[str, str]) -> None:
    """Makes the clips of a small scale that are not there yet."""
    if not isinstance(scale, SmallScale):
        return
    # Imported here: it loads av, which --help does not need.
    from sfa_dist.tools.experiments.clips import make_clips, make_first, make_other
    from sfa_dist.tools.working import working

    first = Path(environ.get("SFA_DATA") or "data") / scale.folder
    kinds = {first: make_first}
    if scale.needs_other(experiment):
        kinds[first.with_name(first.name + OTHER)] = make_other
    for folder, make in kinds.items():
        with stop.nothing_to_save(), working(f"making clips in {folder}"):
            if make_clips(folder, scale.clips, make):
                print(f"made the clips in {folder}", file=sys.stderr)


def _print_jobs(experiment: Experiment, plan: Plan, command: str, environ: Mapping[str, str]) -> None:
    from sfa_dist.tools.experiments.jobs import job_script

    rows = [
        (f"{experiment.name} {name} seed {seed}", steps) for name, own in plan.items() for seed, steps in own.items()
    ]
    script = job_script(rows, command, environ)
    if not script:
        print("all runs are done: without --slurm the command writes the tables", file=sys.stderr)
    print(script, end="")


def _train(
    experiment: Experiment,
    scale: Scale,
    plan: Plan,
    left_out: Mapping[str, str],
    arguments: argparse.Namespace,
    place: tuple[Path, str, StopFlag, Mapping[str, str]],
) -> None:
    """Trains what is missing, a seed of all rows before the next one, and writes the results after each row."""
    from sfa_dist.tools.experiments.execution import Runner, usual_ranks
    from sfa_dist.tools.experiments.pages import keep_earlier, print_results, write_results
    from sfa_dist.tools.experiments.results import read_found, record_of

    out, command, stop, environ = place
    ranks = arguments.ranks or usual_ranks()
    runner = Runner(ranks, stop, environ)
    seeds = list(next(iter(plan.values())))
    with stop.nothing_to_save():
        found = _found_before(experiment, scale, plan, seeds, environ)

    def write() -> tuple[dict[str, Any], list[Path]]:
        record = record_of(experiment, scale.name, command, ranks, found, left_out)
        return record, write_results(record, experiment, out)

    if kept := keep_earlier(experiment, scale.name, found, out):
        text = f"{out / experiment.name}.json has results that are not among those in {RUNS} now"
        print(f"{text}: it is kept in {kept}", file=sys.stderr)
    if any(found.values()):
        write()  # Before anything is trained, which may fail.
    for seed in seeds:
        for name, own in plan.items():
            if seed in [each.seed for each in found[name]]:
                continue
            for step in own[seed]:
                title = f"{experiment.name} {name} seed {seed}"
                runner.run(step, title, lambda text: print(text, file=sys.stderr, flush=True))
            found[name].append(read_found(own[seed], seed))
            write()
    record, written = write()
    print(json.dumps(record)) if arguments.json else print_results(record)
    print(f"written: {', '.join(map(str, written))}", file=sys.stderr)


def _found_before(
    experiment: Experiment, scale: Scale, plan: Plan, seeds: Sequence[int], environ: Mapping[str, str]
) -> dict[str, list[Found]]:
    """What is done already, by row: of the `seeds` asked for, and of all others, as they are results too."""
    from sfa_dist.tools.experiments.results import read_found

    others = further_seeds(experiment, scale, seeds)
    more = plan_of(experiment, scale, others, environ)[0] if others else {}
    found: dict[str, list[Found]] = {}
    for name, own in plan.items():
        runs = {**own, **more.get(name, {})}
        done = [seed for seed, steps in runs.items() if all(step.is_done(environ) for step in steps)]
        found[name] = [read_found(runs[seed], seed) for seed in done]
        for seed in others:
            folder = runs[seed][-1].directory
            if seed in done:
                print(f"{experiment.name} {name}: seed {seed} is finished too, and counts", file=sys.stderr)
            elif folder.is_dir():
                print(f"{experiment.name} {name}: seed {seed} is not finished, and left out: {folder}", file=sys.stderr)
    return found


def _table4(arguments: argparse.Namespace) -> None:
    """Prints and writes the planner's Table 4. Raises UsageError for options that it does not take."""
    for option in ("scale", "seeds", "ranks", "slurm"):
        if getattr(arguments, option):
            raise UsageError(f"table4 is computed by the planner, and trains nothing: it takes no --{option}")
    from sfa_dist.boundary.disk import write_json
    from sfa_dist.plan.table4 import print_table4, table4
    from sfa_dist.tools.experiments.results import made_now
    from sfa_dist.tools.working import working

    with working("planning each model and number of frames"):
        rows = table4()
    out = arguments.out or Path("results")
    out.mkdir(parents=True, exist_ok=True)
    record = {"name": TABLE4, **made_now(shlex.join(["sfa", *sys.argv[1:]])), "rows": [row.as_json() for row in rows]}
    write_json(out / f"{TABLE4}.json", record)
    print(json.dumps(record)) if arguments.json else print_table4(rows)
    print(f"written: {out / f'{TABLE4}.json'}", file=sys.stderr)
