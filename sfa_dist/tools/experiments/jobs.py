"""The runs of an experiment as Slurm jobs: a shell script that gives each run to sbatch, by `sfa submit`.

A job waits for the runs that it starts from. Arguments of the script are options of `sfa submit`, for all of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfa_dist.tools.experiments.steps import Step

_HEAD = """\
#!/bin/bash
# Written by: {command}
# Each run is a job that waits for those it starts from: bash FILE --nodes 2 --time 12:00:00 (options of sfa submit).
# When the jobs are done, the same command without --slurm writes the tables.
set -euo pipefail

submit() {{ # submit DEPENDENCY ARGUMENTS: the number of the job
    local wait=()
    if [[ -n $1 ]]; then wait=("--dependency=afterok:$1" --kill-on-invalid-dep=yes); fi
    shift
    sfa submit "$@" | sbatch --parsable "${{wait[@]}}" | cut -d ';' -f 1
}}

"""


def job_script(rows: Sequence[tuple[str, Sequence[Step]]], command: str, environ: Mapping[str, str]) -> str:
    """The script for rows of (title, steps) in their order; what is done has no job."""
    lines: list[str] = []
    jobs: dict[Path, str] = {}
    for title, steps in rows:
        before = ""
        for step in steps:
            if step.is_done(environ):
                continue
            if step.directory not in jobs:
                job = f"job{len(jobs)}"
                jobs[step.directory] = job
                name = f"--name={step.directory.name}"
                words = shlex.join([*step.words, name])
                lines += [f"# {title}", f'{job}=$(submit "{before}" {words} "$@")', f'echo "{title}: job ${job}"', ""]
            before = f"${jobs[step.directory]}"
    if not lines:
        return ""
    return _HEAD.format(command=command) + "\n".join(lines)
