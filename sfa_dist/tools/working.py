"""The status of a slow command: a line on a terminal's stderr, which disappears when the command is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def working(first: str, silent: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows `first`, then each text that the yielded function is called with.

    Shows nothing if `silent`, or if stderr is not a terminal.
    """
    if silent or not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console

    with Console(stderr=True).status(first) as status:
        yield status.update
