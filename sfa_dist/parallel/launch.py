"""Which launcher started this process, as which rank, and whether it still runs. No torch: this is imported before it.

One entry point serves `python`, `torchrun`, `deepspeed` and `srun python`. torchrun's variables, which the deepspeed
launcher sets too, take precedence over Slurm's.

A launcher that dies of a signal leaves its ranks behind, and they would train on with nobody to stop them. Measured for
SIGUSR1 to torchrun, and for SIGUSR1 and SIGTERM to a single-node deepspeed, whose runner has another process between
itself and the ranks.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass

from sfa_dist.boundary.disk import parse_json
from sfa_dist.errors import UsageError
from sfa_dist.parallel.process_state import command_of, parent_of

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
NODES_VARIABLE = "SFA_NODES"  # The nodes' names in rank order, with equally many ranks each; slurm/_common.sh sets it.
WORLD_INFO = "--world_info="  # Argument of the process that deepspeed starts on a node: {host: [GPU, ...]} in base64.
RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "runner.py", "deepspeed.launcher.runner")


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process. `local_world_size` is the number of ranks on this node."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def prints_errors(self) -> bool:
        """Whether this rank prints an error that all ranks raise, so that each console shows it once.

        srun gathers the output of all nodes; the other launchers may run in one terminal per node.
        """
        return self.rank == 0 or (self.local_rank == 0 and self.launcher != "srun")


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Rank and world size from torchrun's or deepspeed's variables, else from srun's, else of a single process.

    Raises UsageError if only some of a launcher's variables are set, or if they do not describe a rank.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        missing = [key for key in (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if key not in environ]
        if missing:
            raise UsageError(
                f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}; use torchrun, deepspeed or srun"
            )
        local_world = int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", "1")))
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
        return Launch(launcher, *_rank_of(environ, RANK_VARIABLES), local_world)
    # Slurm sets SLURM_NTASKS in a batch script too; only a step started by srun has a step id. The job may have more
    # tasks than the step.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and environ.get(tasks, "1") != "1":
        missing = [key for key in ("SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT") if key not in environ]
        if missing:
            raise UsageError(
                f"srun started several tasks, but {', '.join(missing)} is not set; source slurm/_common.sh"
            )
        per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_NTASKS_PER_NODE", "1")
        local_world = int(per_node.split("(")[0].split(",")[0])
        return Launch("srun", *_rank_of(environ, ("SLURM_PROCID", tasks, "SLURM_LOCALID")), local_world)
    return Launch("python", 0, 1, 0, 1)


def nodes_of_ranks(environ: Mapping[str, str], launch: Launch) -> tuple[str, ...]:
    """The node name of each rank; empty if neither SFA_NODES nor the deepspeed launcher gives them."""
    names = environ.get(NODES_VARIABLE, "").split()
    if names and launch.world_size % len(names) == 0:
        each = launch.world_size // len(names)
        return tuple(name for name in names for _ in range(each))
    for word in command_of(os.getppid()):
        if word.startswith(WORLD_INFO):
            try:
                slots: dict[str, list[int]] = parse_json(base64.urlsafe_b64decode(word.removeprefix(WORLD_INFO)))
                names = [host for host, own in slots.items() for _ in own]
            except (ValueError, TypeError, AttributeError):
                return ()  # From another version or program. The names are used in messages only.
            return tuple(names) if len(names) == launch.world_size else ()
    return ()


def _rank_of(environ: Mapping[str, str], keys: tuple[str, str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) from the variables `keys`. Raises UsageError if they do not describe a rank."""
    shown = ", ".join(f"{key}={environ[key]!r}" for key in keys)
    try:
        rank, world_size, local_rank = (int(environ[key]) for key in keys)
    except ValueError as error:
        raise UsageError(f"the launcher's variables are not numbers: {shown}") from error
    if not 0 <= local_rank <= rank < world_size:
        raise UsageError(f"the launcher's variables contradict each other: {shown}")
    return rank, world_size, local_rank


class LauncherWatch:
    """The launcher's processes above this one, found when this object is made."""

    def __init__(self, launcher: str) -> None:
        self._launcher = launcher
        # Plain `python` has no launcher: the shell that started it may exit before it (nohup).
        self._parent = None if launcher == "python" else os.getppid()
        self._runner = None
        if launcher == "deepspeed" and self._parent is not None:
            above = parent_of(self._parent)
            if above is not None and any(os.path.basename(word) in RUNNERS for word in command_of(above)[:4]):
                self._runner = above

    def lost(self) -> str:
        """A message that names the process that is gone; empty while all of them run."""
        if self._parent is not None and os.getppid() != self._parent:
            return f"its launcher ({self._launcher}, process {self._parent}) is gone"
        if self._runner is not None and self._parent is not None and parent_of(self._parent) != self._runner:
            return f"its launcher ({self._launcher}, process {self._runner}) is gone"
        return ""
