"""The text of Slurm scripts: the batch script of a run, and the shell script that submits it, once or for each stage.

All runs share one form of batch script: the files of slurm/ are what `batch_script` returns for their recipes, and
slurm/_common.sh does the work. Stages and tasks of an array differ only by options of train.py.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

SUBMIT_FOLDER = "${SLURM_SUBMIT_DIR:-$PWD}"  # The repository's root, for scripts that are part of it.
# Prints the lines of "$settings" that set sbatch's own variables.
SITE = "grep -E '^ *(export +)?SBATCH_[A-Z_]+=' \"$settings\""

_BATCH = """\
#!/bin/bash
{comment}
{directives}

# sbatch runs a copy of this file in its spool directory: paths come from where it was submitted, not from $0.
SFA_ROOT=${{SFA_ROOT:-{root}}}
{common}
{variants}run_training {arguments} "$@"
"""

_REPOSITORY = """\
if [[ ! -f $SFA_ROOT/slurm/_common.sh ]]; then
    echo "$SFA_ROOT is not the repository: run sbatch from its root, or set SFA_ROOT" >&2
    exit 64
fi
# shellcheck source=/dev/null
source "$SFA_ROOT/slurm/_common.sh"
"""

_PACKAGE = """\
# What the installed package runs, by the python that the job finds (SFA_VENV).
# shellcheck disable=SC2034
SFA_PROGRAM=(-m sfa_dist.train)
# shellcheck source=/dev/null
source {common}
"""

_SUBMISSION = """\
#!/bin/bash
{comment}
set -euo pipefail

submit() {{ # submit OPTIONS SCRIPT ARGUMENTS: the number of the job
    sbatch --parsable "$@" | cut -d ';' -f 1
}}

# Account, partition and QOS of the site, which sbatch reads before the job starts.
settings=${{SFA_CLUSTER_ENV:-{root}/slurm/cluster.env}}
if [[ -f $settings ]]; then
    set -a
    # shellcheck source=/dev/null
    source <({site})
    set +a
fi

script=$(mktemp)
trap 'rm -f "$script"' EXIT
cat >"$script" <<'{end}'
{batch}{end}

{jobs}
"""


@dataclass(frozen=True)
class Variant:
    """One task of a job array: overrides of the recipe, and the run directory."""

    overrides: tuple[str, ...]
    run_dir: str


@dataclass(frozen=True)
class BatchScript:
    """A batch script. `options` are further options of sbatch, `arguments` those of train.py for all variants.

    `root` is the folder in which the job runs: the repository, or any folder if `common` is given, the path of an
    installed package's _common.sh.
    """

    name: str
    nodes: int
    gpus_per_node: int
    cpus_per_task: int
    time: str
    arguments: tuple[str, ...]
    root: str
    options: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    at_once: int | None = None
    common: str | None = None

    @property
    def array(self) -> tuple[str, ...]:
        """The option that makes the job an array; none without variants."""
        if not self.variants:
            return ()
        limit = f"%{self.at_once}" if self.at_once else ""
        return (f"--array=0-{len(self.variants) - 1}{limit}",)


@dataclass(frozen=True)
class ChainLink:
    """One job of a chain: the batch script with further `arguments` of train.py, on `nodes` nodes."""

    name: str
    nodes: int
    arguments: tuple[str, ...]


def batch_script(batch: BatchScript, comment: str) -> str:
    """The text of the batch script, with `comment` below its first line."""
    directives = (
        f"--job-name={batch.name}",
        f"--nodes={batch.nodes}",
        f"--ntasks-per-node={batch.gpus_per_node}",
        f"--gpus-per-node={batch.gpus_per_node}",
        f"--cpus-per-task={batch.cpus_per_task}",
        f"--time={batch.time}",
        "--output=%x-%A_%a.out" if batch.variants else "--output=%x-%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
        *batch.array,
        *map(shlex.quote, batch.options),
    )
    own = shlex.join(batch.arguments) + (' "${variant[@]}"' if batch.variants else "")
    return _BATCH.format(
        comment=_comment(comment),
        directives="\n".join(f"#SBATCH {option}" for option in directives),
        root=batch.root if batch.root == SUBMIT_FOLDER else shlex.quote(batch.root),
        common=_REPOSITORY if batch.common is None else _PACKAGE.format(common=shlex.quote(batch.common)),
        variants=_choice(batch.variants) if batch.variants else "",
        arguments=own,
    )


def _choice(variants: Sequence[Variant]) -> str:
    lines = []
    for number, variant in enumerate(variants):
        words = [word for override in variant.overrides for word in ("--set", override)]
        lines.append(f"    {number}) variant=({shlex.join([*words, '--run-dir', variant.run_dir])}) ;;")
    last = '    *) fail 64 "there is no task ${SLURM_ARRAY_TASK_ID:-(not an array)}" ;;'
    return "\n".join(["case ${SLURM_ARRAY_TASK_ID:-} in", *lines, last, "esac", ""])


def submission(batch: BatchScript, links: Sequence[ChainLink], comment: str) -> str:
    """A shell script that submits the batch script for each link; each job starts when the one before has succeeded.

    A task of an array waits for the same task of the job before. Jobs that wait for a failed one are removed.
    """
    kind = "aftercorr" if batch.variants else "afterok"
    jobs, before = [], ""
    for number, link in enumerate(links):
        wait = [f'"--dependency={kind}:${before}"', "--kill-on-invalid-dep=yes"] if before else []
        # Repeated on the command line, where they override SBATCH_ACCOUNT and the like.
        words = [f"--job-name={link.name}", f"--nodes={link.nodes}", *batch.options]
        call = " ".join([*map(shlex.quote, words), *wait, '"$script"', *map(shlex.quote, link.arguments)])
        before = f"job{number}"
        jobs.append(f'{before}=$(submit {call})\necho "{link.name}: job ${before}"')
    root = shlex.quote(batch.root)
    text = batch_script(batch, comment)
    return _SUBMISSION.format(
        comment=_comment(comment), root=root, site=SITE, batch=text, end=_end_of(text), jobs="\n".join(jobs)
    )


def _end_of(text: str) -> str:
    """A line that ends a here-document of `text`: one that `text` does not have, whatever its arguments are."""
    end = "END_OF_JOB"
    while end in text.splitlines():
        end = f"END_OF_JOB_{hashlib.sha256(f'{end}{text}'.encode(errors='surrogateescape')).hexdigest()[:16]}"
    return end


def _comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())
