"""`sfa submit`: prints or submits the Slurm script of a recipe; stages as a chain of jobs, seeds as an array."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import sfa_dist
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.errors import UsageError
from sfa_dist.parallel.environment import environment
from sfa_dist.recipe.schema import STAGE_NAMES, Recipe, load_recipe
from sfa_dist.recipe.shipped import SLURM, find_recipe, is_repository, shipped
from sfa_dist.recipe.stage_names import CACHE, RUN_STEPS, TEST
from sfa_dist.tools.slurm_script import SITE, BatchScript, ChainLink, Variant, batch_script, submission

_EPILOG = """\
examples:
  sfa submit --recipe recipes/h_96f.yaml --nodes 2                      prints the script
  sfa submit --recipe recipes/h_96f.yaml --nodes 2 --time 12:00:00 --partition gpu --submit
  sfa submit --recipe recipes/l_128f_cached.yaml --nodes 4 --chain --stage-nodes test=1 --submit
  sfa submit --recipe mine.yaml --seeds 0-4 --at-once 2 --submit
  sfa submit --recipe mine.yaml --vary stage2.optimizer.lr=0.1,0.2,0.4 --seeds 0,1 --submit

The printed script does the same as --submit: it is a batch script for sbatch or, with --chain, a script for bash.
Preemption, containers and the settings of a site: docs/slurm.md
"""

_TIME = re.compile(r"\d{1,9}(:\d\d){0,2}|\d{1,9}-\d\d?(:\d\d){0,2}", re.ASCII)
# A job's name is part of its output file's name, where / would start a folder and % a pattern of Slurm.
_NAME = re.compile(r"(?!-)[\w.,@+=:-]+")
_WORD = re.compile(r"[\w.,@+=:/%-]+")
_BETWEEN_VALUES = re.compile(r",(?![^\[{]*[\]}])")  # Not the commas inside a list or a block.
SEEDS_AT_MOST = 1000
TASKS_AT_MOST = 10_000
LABEL_BYTES = 200  # Bytes after the recipe's name in the run directory of a task, at most.
SITE_OPTIONS = ("account", "partition", "qos")


def add_parser(commands: Any) -> None:
    """Registers the sub-command."""
    parser = commands.add_parser(
        "submit",
        help="print or submit the Slurm script of a recipe; stages as a chain, seeds as an array",
        description="Prints the batch script of a recipe, or submits it. Each GPU has one task.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, type=Path, help="the YAML file that describes the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--run-dir", type=Path, help="the run directory (default: runs/<recipe name>)")
    parser.add_argument("--name", help="the job's name (default: the recipe's)")
    parser.add_argument("--nodes", type=_count, default=1, help="number of nodes (default: 1)")
    parser.add_argument("--gpus-per-node", type=_count, default=8, help="GPUs and tasks of each node (default: 8)")
    parser.add_argument("--cpus-per-task", type=_count, default=12, help="CPU cores for each GPU (default: 12)")
    parser.add_argument("--time", default="24:00:00", help="time limit, as Slurm writes it (default: 24:00:00)")
    for option in SITE_OPTIONS:
        parser.add_argument(f"--{option}", help="default: that of slurm/cluster.env")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further option, e.g. --sbatch=--mem=0"
    )
    parser.add_argument("--stage", choices=RUN_STEPS, help="run only this stage")
    parser.add_argument("--chain", action="store_true", help="make each stage a job that waits for the one before")
    parser.add_argument(
        "--stage-nodes", action="append", default=[], metavar="STAGE=N", help="with --chain: the nodes of a stage"
    )
    parser.add_argument("--seeds", help="a job array over seeds, e.g. 0-4 or 0,3,7")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a job array over values of a key of the recipe",
    )
    parser.add_argument("--at-once", type=_count, help="tasks of the array that run at the same time, at most")
    parser.add_argument("--submit", action="store_true", help="submit instead of printing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints or submits. Raises UsageError for a wrong option, RecipeError for a recipe that does not load."""
    recipe = load_recipe(arguments.recipe, arguments.set, environment()).recipe
    batch = _batch(arguments, recipe)
    links = _links(arguments, recipe, batch)
    comment = without_secrets(f"Written by: sfa submit {_command(arguments)}")
    if not arguments.submit:
        text = submission(batch, links, comment) if arguments.chain else batch_script(_with_site(batch), comment)
        print(text, end="")
        return
    if shutil.which("sbatch") is None:
        raise UsageError("there is no sbatch here: run sfa submit --submit on a login node")
    with tempfile.NamedTemporaryFile("w", prefix="sfa-submit-", errors="surrogateescape") as script:
        script.write(submission(batch, links, comment))
        script.flush()
        done = subprocess.run(["bash", script.name], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UsageError(f"sbatch refused the job: {' '.join(done.stderr.split())}")


def _batch(arguments: argparse.Namespace, recipe: Recipe) -> BatchScript:
    """The batch script that the arguments ask for. Raises UsageError for a value that a script cannot hold."""
    root = Path(sfa_dist.__file__).resolve().parents[1]
    common = None
    if not is_repository(root):  # An installed package: its jobs run in the current folder.
        root, common = Path.cwd(), str(shipped(SLURM) / "_common.sh")
    for text in (str(root), str(arguments.recipe), str(arguments.run_dir or ""), *arguments.set, *arguments.sbatch):
        _require_text(text)
    if not _TIME.fullmatch(arguments.time):
        raise UsageError(f"--time {arguments.time!r} is not a time of Slurm, such as 90, 12:00:00 or 2-12:00:00")
    options = [f"--{key}={_word(key, value)}" for key in SITE_OPTIONS if (value := getattr(arguments, key)) is not None]
    for option in arguments.sbatch:
        if not re.fullmatch(r"-[ -~]+", option):
            raise UsageError(f"--sbatch {option!r} is not an option of sbatch: write, for example, --sbatch=--mem=0")
    name = arguments.name if arguments.name is not None else recipe.name
    if not _NAME.fullmatch(name):
        raise UsageError(f"--name {name!r}: a job's name has letters, digits and . , @ + = : _ - only, not - first")
    variants = _variants(arguments, _in_root(arguments.run_dir or root / "runs" / recipe.name, root))
    if arguments.at_once and not variants:
        raise UsageError("--at-once needs an array: give --seeds or --vary")
    words = ["--recipe", _in_root(find_recipe(arguments.recipe), root)]
    words += [word for override in arguments.set for word in ("--set", override)]
    if arguments.run_dir and not variants:
        words += ["--run-dir", _in_root(arguments.run_dir, root)]
    if arguments.stage:
        words += ["--stage", arguments.stage]
    return BatchScript(
        name=name,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_task=arguments.cpus_per_task,
        time=arguments.time,
        arguments=tuple(words),
        root=str(root),
        options=(*options, *arguments.sbatch),
        variants=variants,
        at_once=arguments.at_once,
        common=common,
    )


def _with_site(batch: BatchScript) -> BatchScript:
    """The batch script with the account, partition and QOS of slurm/cluster.env, where the options name none.

    sbatch reads them before a job starts, so a script that is submitted by hand must have them.
    """
    environ = environment()
    settings = Path(environ.get("SFA_CLUSTER_ENV") or Path(batch.root) / "slurm" / "cluster.env")
    if not settings.is_file():
        return batch
    values = [f'"${{SBATCH_{key.upper()}:-}}"' for key in SITE_OPTIONS]
    script = f"source <({SITE}) && printf '%s\\0' {' '.join(values)}"
    clean = {key: value for key, value in environ.items() if not key.startswith("SBATCH_")}
    done = subprocess.run(
        ["bash", "-c", script], env={**clean, "settings": str(settings)}, capture_output=True, text=True
    )
    found = dict(zip(SITE_OPTIONS, done.stdout.split("\0"), strict=False))
    given = [option.partition("=")[0] for option in batch.options]
    site = [f"--{key}={_word(key, value)}" for key, value in found.items() if value and f"--{key}" not in given]
    return replace(batch, options=(*site, *batch.options))


def _links(arguments: argparse.Namespace, recipe: Recipe, batch: BatchScript) -> list[ChainLink]:
    """One job, or with --chain one for each stage, of which the last makes the report too. Raises UsageError."""
    try:
        nodes = {stage: _count(number) for stage, number in (_split(t, "--stage-nodes") for t in arguments.stage_nodes)}
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--stage-nodes: {error}") from error
    if not arguments.chain:
        if nodes:
            raise UsageError("--stage-nodes needs a chain: give --chain")
        return [ChainLink(batch.name, batch.nodes, ())]
    if arguments.stage:
        raise UsageError("--chain submits every stage, --stage one of them: give one of the two")
    stages = _stages(recipe)
    if unknown := nodes.keys() - set(stages):
        raise UsageError(f"--stage-nodes {min(unknown)}: the chain has {', '.join(stages)}")
    # The last job has no --stage: train.py then does all that is left, the test and the report.
    return [
        ChainLink(
            f"{batch.name}-{stage}",
            nodes.get(stage, batch.nodes),
            () if stage == stages[-1] else ("--stage", stage),
        )
        for stage in stages
    ]


def _stages(recipe: Recipe) -> list[str]:
    stages = [name for name in STAGE_NAMES if getattr(recipe, name) is not None]
    if recipe.stage1 and recipe.stage1.weights:
        stages.remove("stage1")
    if recipe.stage2 and recipe.stage2.cache:
        stages.insert(stages.index("stage2"), CACHE)
    return [*stages, TEST]


def _variants(arguments: argparse.Namespace, run_dir: str) -> tuple[Variant, ...]:
    """Every combination of the values of --vary and --seeds. Raises UsageError, RecipeError if one does not load."""
    axes: dict[str, list[str]] = {}
    for text in arguments.vary:
        key, values = _split(text, "--vary")
        axes[key] = re.split(_BETWEEN_VALUES, values)
    if arguments.seeds is not None:
        axes["seed"] = [str(seed) for seed in _seeds(arguments.seeds)]
    tasks = prod(map(len, axes.values()))
    if tasks > TASKS_AT_MOST:
        raise UsageError(f"--vary and --seeds make an array of {tasks:,} tasks: at most {TASKS_AT_MOST:,} are allowed")
    variants = []
    for combination in product(*axes.values()) if axes else ():
        settings = dict(zip(axes, combination, strict=True))
        overrides = tuple(f"{key}={value}" for key, value in settings.items())
        load_recipe(arguments.recipe, [*arguments.set, *overrides], environment())
        label = _label(settings)
        if len(label) > LABEL_BYTES:
            raise UsageError(f"--vary {label[:60]}...: too long for a run directory's name: give fewer values")
        variants.append(Variant(overrides, f"{run_dir}-{label}"))
    if len({variant.run_dir for variant in variants}) < len(variants):
        raise UsageError("--vary and --seeds give two tasks the same run directory: is a value given twice?")
    return tuple(variants)


def _label(settings: Mapping[str, str]) -> str:
    """The settings as part of a folder's name: `seed-0`, `stage2.optimizer.lr-0.1_seed-0`."""
    return "_".join(re.sub(r"[^A-Za-z0-9_.+-]", "_", f"{key}-{value}") for key, value in settings.items())


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        if match is None:
            raise UsageError(f"--seeds {text!r}: write 0-4 or 0,3,7")
        first = int(match[1])
        last = int(match[2] or first)
        if not first <= last < first + SEEDS_AT_MOST:
            raise UsageError(f"--seeds {text!r}: {part} is not a range of 1 to {SEEDS_AT_MOST} seeds")
        seeds += range(first, last + 1)
    return seeds


def _split(text: str, option: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign and value):
        raise UsageError(f"{option} {text!r}: write {option} KEY=VALUE")
    return key, value


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number greater than 0")
    return int(text)


def _word(option: str, text: str) -> str:
    if not _WORD.fullmatch(text):
        raise UsageError(f"--{option} {text!r}: give letters, digits and . , @ + = : / % _ - only")
    return text


def _require_text(text: str) -> None:
    """Raises UsageError for characters that bash would not read back from a script."""
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in text):
        raise UsageError(f"{text!r} has characters that a job's script cannot hold")


def _in_root(path: Path, root: Path) -> str:
    """A path for a job that runs in `root`: relative if it lies below, and never with a leading dash."""
    path = path.absolute()
    text = str(path.relative_to(root) if path.is_relative_to(root) else path)
    return f"./{text}" if text.startswith("-") else text


def _command(arguments: argparse.Namespace) -> str:
    """The given options, as one can type them again."""
    words: list[str] = []
    for key, value in vars(arguments).items():
        option = f"--{key.replace('_', '-')}"
        if key == "run" or value in (None, False, []):
            continue
        if value is True:
            words.append(option)
        else:
            words += [f"{option}={one}" for one in (value if isinstance(value, list) else [value])]
    return shlex.join(words)
