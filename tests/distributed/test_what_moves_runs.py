"""Whole runs that see what moves alone: the same under each engine, from end to end, and on stored features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import train, train_ranks
from tiny_runs import SHORT, losses, make_workplace, sets

KEYS = sets("model.subtract=median", "model.centre=true", "model.positions=sincos", "model.pooling=attention")

Losses = dict[tuple[str, int], tuple[float, float]]


def agree(one: Losses, other: Losses) -> None:
    """To 1e-4 at every step (fp32)."""
    assert one.keys() == other.keys()
    for step, pair in one.items():
        assert other[step] == pytest.approx(pair, rel=1e-4), step


def test_engines_agree_on_two_ranks(tmp_path: Path) -> None:
    """Fixed positions are no parameter, which each engine leaves whole; an attention pool is a unit of its own."""
    place, found = make_workplace(tmp_path, SHORT), {}
    for name, engine in {"zero3": "engine.zero=3", "fsdp": "engine.name=fsdp"}.items():
        arguments = ("--recipe", "t.yaml", "--run-dir", name, *KEYS, *sets(engine))
        for rank in train_ranks(2, place, *arguments):
            finished = rank.wait()
            assert finished.code == 0, finished.err
        found[name] = losses(place / name)
    agree(found["zero3"], found["fsdp"])


def test_centred_vectors_of_a_cache_are_those_of_live_training(tmp_path: Path) -> None:
    """All phases are stored, so the clips are the same."""
    place = make_workplace(tmp_path, SHORT)
    model = ("model.centre=true", "model.position_std=0.5", "model.pooling=attention", "model.tubelet_init=difference")
    keys = sets(*model, "stage2.cache={views: 1, phases: 2}")
    for name, own in (("cached", keys), ("live", keys[:-2])):
        finished = train(place, "--recipe", "t.yaml", "--run-dir", name, *own)
        assert finished.code == 0, finished.err
    agree(losses(place / "cached"), losses(place / "live"))
    assert "acc1" in json.loads((place / "cached" / "result.json").read_text())
