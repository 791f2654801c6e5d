"""Ranks that would not compute the same are refused at the start, and the odd ones are named."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from sfa_dist.errors import RecipeError
from sfa_dist.parallel.runtime import Runtime


def compare(runtime: Runtime, *rounds: tuple[str, ...]) -> list[tuple[str, bool] | None]:
    """The refusals of `require_equal`, one a round: (message, whether this rank prints it); None where all agreed."""
    out: list[tuple[str, bool] | None] = []
    for values in rounds:
        try:
            runtime.require_equal("the code", values[runtime.rank])
            out.append(None)
        except RecipeError as error:
            out.append((str(error).replace(runtime.host, "HOST"), not error.print_suppressed))
    return out


@pytest.mark.fault(46, 61)
@pytest.mark.parametrize(
    ("world_size", "rounds", "odd"),
    [
        (2, [("a", "a"), ("a", "b")], [None, "rank 1 on HOST: b, but on the other 1: a"]),
        (
            3,
            [("a", "a", "a"), ("a", "b", "b"), ("a", "a", "b"), ("a", "b", "c")],
            [
                None,
                "rank 0 on HOST: a, but on the other 2: b",
                "rank 2 on HOST: b, but on the other 2: a",
                "rank 1 on HOST: b, rank 2 on HOST: c, but on the other 1: a",
            ],
        ),
    ],
)
@pytest.mark.fault(61)
def test_names_the_minority(world_size: int, rounds: list[tuple[str, ...]], odd: list[str | None]) -> None:
    everywhere = run_ranks(world_size, compare, *rounds)
    for number, expected in enumerate(odd):
        for rank in range(world_size):
            got = everywhere[rank][number]
            if expected is None:
                assert got is None
            else:
                message, printed = got
                assert message.startswith(f"the ranks disagree on the code: {expected};")
                assert printed == (rank == 0)
