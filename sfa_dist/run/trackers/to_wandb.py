"""Weights & Biases (`log.wandb`): online where there is a key, offline in the run directory elsewhere."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sfa_dist.boundary.disk import print_line, write_if_new
from sfa_dist.boundary.secret import without_secrets
from sfa_dist.recipe.blocks import LogBlock
from sfa_dist.run.trackers.sink import Line, curves

WANDB_URL = "https://api.wandb.ai"
SERVICE = "wandb-"  # wandb-core and wandb-symon, its own processes.


def wandb_mode(log: LogBlock, environ: Mapping[str, str]) -> str | None:
    """`online` or `offline`; None for a run without wandb. Prints a line where the recipe's `online` lacks a key."""
    if log.wandb == "off" or environ.get("WANDB_MODE") == "disabled":
        return None
    mode: str = log.wandb
    if mode == "auto":
        mode = environ.get("WANDB_MODE") or ("online" if _has_key(environ) else "offline")
    if mode == "online" and not _has_key(environ):  # wandb would ask for one and wait.
        print_line("wandb is offline: there is no key (WANDB_API_KEY or .netrc); `wandb sync` sends the run later")
        return "offline"
    return mode


class WandbSink:
    """One wandb run for all starts of a run; its id is in `wandb/run_id` of the run directory."""

    name = "wandb"

    def __init__(self, run_dir: Path, project: str, mode: str, config: Mapping[str, Any]) -> None:
        self._run_dir, self._project, self._mode, self._config = run_dir, project, mode, config
        self._wandb: Any = None
        self._run: Any = None

    def load(self) -> None:
        import wandb

        self._wandb = wandb

    def open(self) -> None:
        id_file = self._run_dir / "wandb" / "run_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
        id_file.parent.mkdir(exist_ok=True)
        write_if_new(id_file, run_id)
        self._run = self._wandb.init(
            project=self._project,
            name=self._run_dir.name,
            id=run_id,
            resume="allow" if self._mode == "online" else None,
            mode=self._mode,
            dir=str(self._run_dir),
            config=dict(self._config),
            # wandb's metadata holds the command line as it was typed, with its secrets.
            settings=self._wandb.Settings(
                silent=True, console="off", x_disable_meta=any(without_secrets(word) != word for word in sys.argv)
            ),
        )

    def write(self, line: Line) -> None:
        run, self._run = self._run, None  # A run whose log fails is not finished either.
        # The step is sent as a value: it starts anew in each stage, and wandb's own step may not.
        run.log({"stage": line.get("stage"), **dict(curves(line))})
        self._run = run

    def close(self) -> None:
        """Ends wandb's run and its service.

        wandb's own exit handler prints a traceback if the service has gone before, as after a Ctrl-C.
        """
        if self._wandb is None:
            return
        try:
            if self._run is not None:
                self._run.finish()
        finally:
            self._wandb.teardown()

    def abandon(self) -> None:
        """Ends its processes: wandb's exit handler would wait for them without a bound."""
        import psutil  # deepspeed needs it too.

        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.name().startswith(SERVICE):
                    child.kill()


def _has_key(environ: Mapping[str, str]) -> bool:
    """Whether wandb finds a key without asking for one."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or WANDB_URL).hostname or ""
    try:
        return netrc(environ.get("NETRC") or Path(environ.get("HOME", "/")) / ".netrc").authenticators(host) is not None
    except (OSError, NetrcParseError, UnicodeDecodeError):
        return False
