"""The exception for a sample that cannot be used in a run that can go on."""

from __future__ import annotations


class BadSample(Exception):  # noqa: N818 -- it is a verdict on a sample, counted against a budget, not a failure of the run
    """A sample that cannot be read, decoded or labelled. `reason` is one line for the log and the bad-sample count."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class OverLimit(BadSample):
    """A video that exceeds `data.limits`; it is not salvaged."""
