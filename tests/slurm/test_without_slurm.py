"""Several nodes without Slurm, by torchrun and by deepspeed over ssh: the nodes change nothing in what is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from node_runs import Console, Nodes, bits
from tiny_runs import sets

pytestmark = pytest.mark.slurm

ONE_NODE, TWO_NODES, FOUR_NODES = LAYOUTS = ((1, 2), (2, 1), (4, 1))  # nodes, ranks a node
WAYS = {
    "torchrun-tree": sets("engine.reduction=tree"),
    "torchrun-fsdp": sets("engine.name=fsdp"),
    "deepspeed-zero2": sets("engine.zero=2"),
}
TOLERANCE = 1e-4  # Of losses in fp32 after 12 steps; gradients are summed in another order.
Done = Callable[[str, tuple[int, int]], Path]


@pytest.fixture(scope="module")
def done(nodes: Nodes) -> Done:
    """The run directory of one way on one layout, which has come to its end."""

    @cache
    def run(way: str, layout: tuple[int, int]) -> Path:
        directory = nodes.place / f"{way}-{layout[0]}x{layout[1]}"
        arguments = ("--run-dir", str(directory), *WAYS[way])
        consoles: list[Console] = (
            nodes.torchrun(layout, *arguments) if way.startswith("torchrun") else [nodes.deepspeed(layout, *arguments)]
        )
        for console in consoles:
            assert console.code() == 0, console.said()
        return directory

    return run


@pytest.mark.parametrize("way", WAYS)
def test_one_node_and_two_give_the_same_bits(done: Done, way: str) -> None:
    """As many ranks, so each engine sums in the same order."""
    one, two = done(way, ONE_NODE), done(way, TWO_NODES)
    assert bits(one) == bits(two)
    record = json.loads((two / "env.json").read_text())
    assert [rank["host"] for rank in record["ranks"]] == ["node1", "node2"]
    assert record["launcher"] == way.partition("-")[0]
    assert (two / "result.json").exists()


def test_exact_mode_gives_the_same_bits_on_four_nodes(done: Done) -> None:
    assert bits(done("torchrun-tree", FOUR_NODES)) == bits(done("torchrun-tree", TWO_NODES))


@pytest.mark.parametrize(("way", "layout"), [("torchrun-fsdp", TWO_NODES), ("deepspeed-zero2", FOUR_NODES)])
def test_sharded_engines_agree_with_the_exact_mode(done: Done, way: str, layout: tuple[int, int]) -> None:
    """Which shows that they had the same batches."""
    exact = bits(done("torchrun-tree", TWO_NODES))[0]
    found = bits(done(way, layout))[0]
    assert found.keys() == exact.keys()
    for key, (loss, norm) in exact.items():
        assert found[key] == pytest.approx((loss, norm), abs=TOLERANCE), key
