"""The process environment. The only file that touches it; others take it as an argument. No torch: a login node
imports this."""

from __future__ import annotations

import os
from collections.abc import Mapping


def environment() -> Mapping[str, str]:
    """The variables of this process."""
    return dict(os.environ)


def set_default(name: str, value: str) -> None:
    """Sets a variable for libraries that read it at import, unless the user has set it."""
    os.environ.setdefault(name, value)


def replace_environment(values: Mapping[str, str]) -> None:
    """Makes `values` all the variables of this process: for one that was forked to be another program."""
    os.environ.clear()
    os.environ.update(values)
