"""Runs on the cluster's nodes without Slurm: by a launcher on each node, or by one that goes to the nodes over ssh."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from commands import ONE_THREAD, program
from slurm_cluster import ROOT, SCRIPT, Cluster, wait_for
from tiny_runs import RECIPE, losses, make_workplace

LIMIT = 400.0  # Seconds for what takes 20 on a machine with nothing else to do; below the 600 that ranks wait.
TRAIN = str(ROOT / "sfa_dist" / "train.py")
STAGES = ("stage1", "stage2")
# Exact mode needs the same batch on 1, 2 and 4 ranks: 8 clips in 4 micro-batches.
SMALL = RECIPE[: RECIPE.index("image:\n")] + (
    "stage1: {frames: 4}\nstage2: {frames: 8, chunk_frames: 4}\nlog: {every: 1, wandb: 'off'}\n"
)
SSHD = """\
AuthorizedKeysFile {folder}/key.pub
HostKey {folder}/host
PermitRootLogin prohibit-password
PidFile none
StrictModes no
UsePAM no
"""
SSH = """\
IdentityFile {folder}/key
LogLevel ERROR
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
"""


class Console:
    """A command that runs on a node, as if it were typed there."""

    def __init__(self, cluster: Cluster, node: str, place: Path, command: Sequence[str], **environ: str) -> None:
        files = [place / f"{time.monotonic_ns()}-{node}.{name}" for name in ("out", "err")]
        # `timeout` is inside: it ends with all that it started, whatever becomes of this process.
        words = [str(SCRIPT), "--state", str(cluster.state), "on", node, "timeout", "-k", "5", f"{LIMIT:.0f}", *command]
        self.node, (self._out, self._err) = node, files
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                words,
                cwd=place,
                env=cluster.environ() | ONE_THREAD | environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self._started = time.monotonic()

    def code(self) -> int:
        """Its exit code, when it has ended."""
        wait_for(f"the end on {self.node}", lambda: self._process.poll() is not None, self.said, LIMIT + 10)
        return self._process.returncode

    def seconds_until(self, text: str) -> float:
        """After how long its stderr had this."""
        wait_for(f"{text!r} on {self.node}", lambda: text in self.errors(), self.said, LIMIT)
        return time.monotonic() - self._started

    def errors(self) -> str:
        """Its stderr so far."""
        return self._err.read_text(errors="replace")

    def said(self) -> str:
        """All of its output so far."""
        return self._out.read_text(errors="replace") + self.errors()

    def error_lines(self) -> list[str]:
        """What train.py says on stderr when it cannot go on."""
        return [line[line.index("error: ") :] for line in self.errors().splitlines() if "error: " in line[:20]]


@dataclass(frozen=True)
class Nodes:
    """Starts runs of the tiny recipe in the folder `place`, which all nodes see."""

    cluster: Cluster
    place: Path
    ssh: Path

    def on(self, node: str, *command: str, **environ: str) -> Console:
        """A command on a node."""
        return Console(self.cluster, node, self.place, command, **environ)

    def torchrun(self, layout: tuple[int, int], *arguments: str, **environ: str) -> list[Console]:
        """torchrun on each of (nodes, ranks a node): they meet on node1."""
        nodes, ranks = layout
        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400", "--rdzv-id=test"]
        words = [program("torchrun"), f"--nnodes={nodes}", f"--nproc-per-node={ranks}", *meeting]
        return [self.on(f"node{k}", *words, *train_words(*arguments), **environ) for k in range(1, nodes + 1)]

    def deepspeed(self, layout: tuple[int, int], *arguments: str, at: str = "node1", **environ: str) -> Console:
        """deepspeed on the node `at`, which goes to each of (nodes, ranks a node) over ssh."""
        words = [program("deepspeed"), "--hostfile", str(self.hostfile(layout))]
        handed = ONE_THREAD | {"TMPDIR": self.cluster.environ()["TMPDIR"]} | environ
        (self.place / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in handed.items()))
        return self.on(at, *words, *train_words(*arguments), PATH=f"{self.ssh}:{os.environ['PATH']}")

    def deepspeed_by_hand(self, layout: tuple[int, int], node: int, *arguments: str, **environ: str) -> Console:
        """deepspeed on one node, which goes nowhere: the same line has to be typed on the others."""
        words = [program("deepspeed"), "--hostfile", str(self.hostfile(layout)), "--no_ssh", "--master_addr", "node1"]
        return self.on(f"node{node + 1}", *words, f"--node_rank={node}", *train_words(*arguments), **environ)

    def hostfile(self, layout: tuple[int, int]) -> Path:
        """Of deepspeed, for (nodes, ranks a node)."""
        nodes, ranks = layout
        hostfile = self.place / f"hosts-{nodes}x{ranks}"
        hostfile.write_text("".join(f"node{k} slots={ranks}\n" for k in range(1, nodes + 1)))
        return hostfile

    def by_hand(
        self, nodes: int, *arguments: str, only: Mapping[str, Mapping[str, str]] = {}, **environ: str
    ) -> list[Console]:
        """One rank on each node, with the variables that a launcher sets, and no launcher; `only` adds a node's own."""
        common = {"WORLD_SIZE": str(nodes), "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29600"}
        words = [sys.executable, *train_words(*arguments)]
        return [
            self.on(node, *words, RANK=str(rank), **{**common, **environ, **only.get(node, {})})
            for rank, node in enumerate(f"node{k}" for k in range(1, nodes + 1))
        ]


def train_words(*arguments: str) -> list[str]:
    """train.py with the tiny recipe."""
    return [TRAIN, "--recipe", "t.yaml", *arguments]


def write_place(folder: Path) -> Path:
    """Clips and the recipe t.yaml."""
    return make_workplace(folder, SMALL)


def start_ssh(cluster: Cluster, folder: Path, nodes: Sequence[str]) -> Path:
    """sshd on the nodes, until the cluster ends; the folder for PATH whose `ssh` may log in there, from any node."""
    for key in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # Where sshd locks itself up before a login; the system's own makes it too.
    for node in nodes:
        cluster.control("on", node, "/usr/sbin/sshd", "-f", str(folder / "sshd_config"))
    return folder / "bin"


def bits(run: Path) -> tuple[Mapping[tuple[str, int], tuple[float, float]], list[str]]:
    """All losses and gradient norms of a run, and the sha256 of its stages' weights."""
    weights = [run / stage / "weights.safetensors" for stage in STAGES]
    return losses(run), [hashlib.sha256(file.read_bytes()).hexdigest() for file in weights]
