"""Work in a process of its own: what it does to its process, or leaves behind in it, ends with it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P, T = ParamSpec("P"), TypeVar("T")


def apart(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """`work(*arguments, **named)`, all of which pickle takes, in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments, **named).result()
