"""What a command that takes its time is at: a line on a terminal's stderr, gone when it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def working(first: str, silent: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows `first`, then whatever the function it gives is called with. Nothing where stderr is no terminal."""
    if silent or not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console

    with Console(stderr=True).status(first) as status:
        yield status.update
