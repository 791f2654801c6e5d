"""The order of the exact engine's additions: fixed by the number of micro-batches, the same for any ranks."""

from __future__ import annotations

from itertools import count

import pytest

from sfa_dist.parallel.engines.exact import TreeSum


class Term(str):
    """A tensor's stand-in that writes down how it was added."""

    def add_(self, other: str) -> Term:
        return Term(f"({self}+{other})")


def added(terms: list[Term]) -> Term:
    tree = TreeSum(len(terms))
    for term in terms:
        tree.add(term)  # type: ignore[arg-type]
    return tree.take()  # type: ignore[return-value]


def numbers(first: int, how_many: int) -> list[Term]:
    return [Term(number) for number in range(first, first + how_many)]


@pytest.mark.parametrize(
    ("leaves", "order"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (6, "(((0+1)+2)+((3+4)+5))"),
        (8, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
    ],
)
def test_order(leaves: int, order: str) -> None:
    assert added(numbers(0, leaves)) == order


@pytest.mark.parametrize("leaves", range(1, 49))
def test_ranks_hold_branches(leaves: int) -> None:
    for world in (2**power for power in count()):
        if leaves % world:
            return
        share = leaves // world
        branches = [added(numbers(rank * share, share)) for rank in range(world)]
        while len(branches) > 1:  # As `sum_over_ranks` does it.
            branches = [left.add_(right) for left, right in zip(branches[0::2], branches[1::2], strict=True)]
        assert branches == [added(numbers(0, leaves))]


def test_holds_few_tensors_and_starts_anew() -> None:
    tree = TreeSum(64)
    for _ in range(2):
        for term in numbers(0, 64):
            tree.add(term)  # type: ignore[arg-type]
            assert len(tree._branches) <= 7
        assert tree.take() == added(numbers(0, 64))
