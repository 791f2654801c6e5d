"""Tiny runs under the project's own scripts, on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from slurm_cluster import ROOT, Cluster, Job, wait_for
from tiny_runs import RECIPE, STEPS_PER_EPOCH, log_lines, losses, make_workplace, sets

G_SCRIPT, H_SCRIPT = "slurm/vivit_g_48f.sh", "slurm/vivit_h_96f.sh"
ENGINES = {"zero2": [], "fsdp": sets("engine.name=fsdp")}
EPOCHS = 20  # Of stage 1.
STEPS = EPOCHS * STEPS_PER_EPOCH
Losses = dict[tuple[str, int], tuple[float, float]]


def write_workplace(folder: Path) -> Path:
    """Clips and the recipe t.yaml: enough steps to be interrupted between two checkpoints, then a short stage 2."""
    blocks = RECIPE[: RECIPE.index("image:\n")].replace("epochs: 2", f"epochs: {EPOCHS}").replace('["', f'["{folder}/')
    stages = """\
checkpoint: {every_steps: 5}
stage1: {frames: 4, data: {val: []}}
stage2: {frames: 8, chunk_frames: 4, schedule: {epochs: 2}}
log: {every: 1, wandb: "off"}
device: cpu  # the scripts ask for GPUs, and these nodes' GPUs are none
"""
    return make_workplace(folder, blocks + stages)


@dataclass
class TinyRun:
    """A job and its run directory."""

    job: Job
    directory: Path

    def step(self) -> int:
        """Of the last line of stage 1 in log.jsonl."""
        if not (self.directory / "log.jsonl").exists():
            return 0
        return max((line["step"] for line in log_lines(self.directory) if line["kind"] == "train"), default=0)

    def wait_for_step(self, step: int) -> None:
        """Until stage 1 has come so far."""
        asked = count()

        def is_there() -> bool:
            if next(asked) % 10 == 0:
                assert self.job.fields()["JobState"] in ("PENDING", "RUNNING"), self.job.said()
            return self.step() >= step

        wait_for(f"step {step}", is_there, self.job.said)

    def losses(self) -> Losses:
        """Of all its steps; those that were computed twice were the same."""
        return losses(self.directory)


@dataclass
class Runs:
    """Submits runs, and keeps what those that are left alone give."""

    cluster: Cluster
    place: Path
    _alone: dict[tuple[str, int], Losses] = field(default_factory=dict)

    def submit(
        self,
        name: str,
        *arguments: str,
        nodes: int = 2,
        script: str = G_SCRIPT,
        options: Sequence[str] = (),
        **environ: str,
    ) -> TinyRun:
        """sbatch of a script as it is, with one task a node and the tiny recipe, from the repository's root."""
        output, directory = self.place / f"{name}.out", self.place / name
        small = (f"--nodes={nodes}", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={output}")
        given = ("--recipe", str(self.place / "t.yaml"), "--run-dir", str(directory), *arguments)
        number = self.cluster.run("sbatch", "--parsable", *small, *options, str(ROOT / script), *given, **environ)
        return TinyRun(self.cluster.job(number.strip(), output), directory)

    def left_alone(self, engine: str, nodes: int) -> Losses:
        """Losses of a run that nobody interrupts."""
        if (engine, nodes) not in self._alone:
            script = H_SCRIPT if nodes == 4 else G_SCRIPT
            run = self.submit(f"alone-{engine}-{nodes}", *ENGINES[engine], nodes=nodes, script=script)
            run.job.completes()
            assert (run.directory / "result.json").exists()
            self._alone[engine, nodes] = run.losses()
        return self._alone[engine, nodes]
