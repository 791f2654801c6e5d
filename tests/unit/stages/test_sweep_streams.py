"""Heads of a sweep share one stream: it ends with the last of them, also where one leaves before it has asked."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sfa_dist.stages.sweep import SharedEpochs


@pytest.mark.parametrize("leaves", [("b",), ("b", "c"), ()])
def test_a_stream_ends_with_the_last_head_that_takes_it(leaves: tuple[str, ...]) -> None:
    closed: list[int] = []

    def epoch(number: int, first: int) -> Iterator[dict[str, Any]]:
        try:
            yield from ({"step": step} for step in range(first, 3))
        finally:
            closed.append(number)

    shared = SharedEpochs(epoch, 3)  # type: ignore[arg-type]
    trainers: Any = {name: SimpleNamespace(progress=SimpleNamespace(step=0)) for name in "abc"}
    shared.trainers = trainers
    mine = shared("a", 0, 0)
    assert next(mine) == {"step": 0}
    for name in leaves:
        shared.leave(name)
    rest = {name: shared(name, 0, 0) for name in "bc" if name not in leaves}
    for stream in rest.values():
        assert [batch["step"] for batch in stream] == [0, 1, 2]
    assert [batch["step"] for batch in mine] == [1, 2]
    assert closed == [0]
    assert not shared._waiting


def test_one_that_leaves_in_the_middle_of_its_stream_takes_no_other() -> None:
    def epoch(number: int, first: int) -> Iterator[dict[str, Any]]:
        yield from ({"step": step} for step in range(first, 3))

    shared = SharedEpochs(epoch, 3)  # type: ignore[arg-type]
    trainers: Any = {name: SimpleNamespace(progress=SimpleNamespace(step=0)) for name in "ab"}
    shared.trainers = trainers
    streams = {name: shared(name, 0, 0) for name in "ab"}
    assert next(streams["a"]) == next(streams["b"]) == {"step": 0}
    trainers["a"].progress.step = 1
    streams["a"].close()
    shared.leave("a")
    assert [batch["step"] for batch in streams["b"]] == [1, 2]
    trainers["b"].progress.step = 3
    assert [batch["step"] for batch in shared("b", 1, 0)] == [0, 1, 2]
