"""The process environment. The only module that reads or changes os.environ; others take it as an argument.

No torch: login nodes import this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def environment() -> Mapping[str, str]:
    """A copy of this process's variables."""
    return dict(os.environ)


def set_default(name: str, value: str) -> None:
    """Sets a variable that a library reads when it is imported, unless the user has set it."""
    os.environ.setdefault(name, value)


def hide_gpus() -> None:
    """Hides the GPUs from this process and its children. CUDA must not have started yet."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def temporarily(name: str, value: str) -> Iterator[None]:
    """Sets a variable inside the block, for a library that reads it there."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def replace_environment(values: Mapping[str, str]) -> None:
    """Replaces all variables of this process by `values`, for a forked process that becomes another program."""
    os.environ.clear()
    os.environ.update(values)
