"""The shipped recipe of EPIC-Kitchens-100, tiny: mixup and label smoothing over two heads, the same on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, train_ranks
from epic_clips import TRAIN, VALIDATION, make_epic
from test_data_sets import TINY, TINY_STAGE_2
from tiny_runs import losses, sets

RECIPE = str(ROOT / "recipes" / "epic_kitchens100" / "l_128f.yaml")


def test_nouns_and_verbs_are_mixed_and_scored(tmp_path: Path) -> None:
    place = make_epic(tmp_path)
    data = sets(*(f"data.{to}=['shards/{of}-*.tar']" for to, of in (("train", "train"), ("val", "validation"))))
    data += sets("data.test=['shards/validation-*.tar']", "model.drop_path=0.0")  # Its masks go with the micro-batch.
    for ranks in (1, 2):
        run = ("--recipe", RECIPE, "--run-dir", f"on {ranks}", *TINY, *TINY_STAGE_2, *data)
        for rank in train_ranks(ranks, place, *run):
            finished = rank.wait()
            assert finished.code == 0, finished.err
    result = json.loads((place / "on 1" / "result.json").read_text())
    assert (result["samples"], result["views"]) == (VALIDATION, 1)
    for head in ("noun", "verb", "action"):
        assert 0 <= result[f"{head}_acc1"] <= result[f"{head}_acc5"] <= 1
    assert [stage["samples_seen"] for stage in result["stages"].values()] == [TRAIN, TRAIN]
    alone, together = losses(place / "on 1"), losses(place / "on 2")
    assert alone.keys() == together.keys()
    for key, (loss, norm) in alone.items():
        assert np.isfinite(loss)
        assert together[key] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3))
