"""The planner: time, disk and data, its search, its advice and its command."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import write_shards
from plan_stages import GIB, ROOT, recipe, stage2
from torch.utils.flop_counter import FlopCounterMode

from sfa_dist.errors import UsageError
from sfa_dist.models.vivit import Tail, Trunk
from sfa_dist.plan.cards import CARDS, card_of_size, find_card, peak_tflops
from sfa_dist.plan.cost import cost_ratio, cost_shares, why_above_one
from sfa_dist.plan.dataset import count_clips
from sfa_dist.plan.duration import stage_duration
from sfa_dist.plan.feature_cache_plan import clips_in_a_view
from sfa_dist.plan.flops import clip_flops, forward_macs
from sfa_dist.plan.recipe_plan import memory_line, plan_recipe
from sfa_dist.plan.search import largest
from sfa_dist.recipe.blocks import AdapterBlock, ModelBlock
from sfa_dist.tools.cli import main

TINY = {"size": "tiny", "classes": 5, "image_size": 32, "temporal_depth": 1}


# --- Time, disk, data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "pooling"),
    [("pooled", "cls"), ("pooled", "gap"), ("pooled", "attention"), ("tokens", "cls"), ("tokens", "gap")],
)
def test_operations_are_those_that_torch_counts(placement: Any, pooling: Any) -> None:
    model, adapter = ModelBlock(**TINY, pooling=pooling), AdapterBlock(placement=placement)
    with torch.device("meta"):
        trunk, tail = Trunk(model), Tail(model, 8, adapter)
        tubelets = torch.empty(4, 3, 2, 32, 32)
    with FlopCounterMode(display=False) as counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        features = trunk.forward_tubelets(tubelets, pooled=not tail.takes_tokens)
        of_trunk = counted.get_total_flops()
        tail(features.unflatten(0, (1, 4)))
    macs = forward_macs(model, 8, adapter)
    assert 2 * macs.trunk == of_trunk
    assert 2 * macs.tail == counted.get_total_flops() - of_trunk


@pytest.mark.parametrize(("name", "ratio"), [("l_128f", 0.396), ("h_96f", 0.417), ("g_48f", 0.50)])
def test_cost_ratio_is_the_floor_of_the_method(name: str, ratio: float) -> None:
    """8 frames end to end, then a frozen forward pass: 8 / F + 1/3 and a little for the tail."""
    found = cost_ratio(recipe(name))
    assert found == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (
            ["stage1.schedule.epochs=600"],
            "stage 1 1.25 (600 epochs x 8 frames; end to end 30 x 128), stage 2 0.34 (1% of the model's operations are "
            "trained), as shares of end to end; lower with fewer epochs or frames in stage 1, or with more frames in "
            "stage 2",
        ),
        (
            ["stage1.schedule.epochs=450", "stage1.activation=checkpoint"],
            "450 epochs x 8 frames; end to end 30 x 128, its activations computed twice",
        ),
        (["stage2.frames=8", "stage2.adapter=null", "stage1.activation=checkpoint"], "stage 2 0."),
    ],
)
def test_a_ratio_above_one_is_explained(sets: list[str], words: str) -> None:
    found = why_above_one(recipe("l_128f", *sets))
    assert found is not None
    assert words in found
    assert "\n" not in found


def test_the_costs_of_a_cache_are_explained() -> None:
    many = recipe("l_128f_cached", "stage2.cache.views=64", "stage2.schedule.epochs=2")
    shares = cost_shares(many, 240_436)
    assert shares is not None
    assert shares.cache > shares.stage1 > shares.stage2
    words = why_above_one(many, 240_436)
    assert words is not None
    assert words.startswith(f"the cache {shares.cache:.2f} (64 views of whole videos for 2 epochs), stage 1 ")
    assert "lower with fewer stage2.cache.views" in words


def test_a_ratio_below_one_needs_no_explanation() -> None:
    assert why_above_one(recipe("l_128f")) is None
    assert why_above_one(recipe("l_128f", "stage2=null")) is None


def test_hours_follow_from_operations_clips_and_ranks() -> None:
    stage, card = stage2("h_96f"), find_card("H100")
    clips = count_clips(stage, None)
    one, eight = (stage_duration(stage, clips, card, ranks) for ranks in (1, 8))
    assert one.steps == eight.steps == 30 * -(-240_436 // 64)
    assert one.hours is not None
    assert one.hours == pytest.approx(one.steps * 64 * clip_flops(stage) / (0.4 * 989e12) / 3600)
    assert eight.hours == pytest.approx(one.hours / 8)
    assert eight.gpu_hours == pytest.approx(one.hours)
    assert one.evaluation_hours == pytest.approx(one.hours * 19_796 / 240_436, rel=0.02)
    measured = stage_duration(stage, clips, card_of_size(16), 8, micro_seconds=2.0)
    assert measured.hours == pytest.approx(one.steps * 2 * 2.0 / 3600)
    assert stage_duration(stage, clips, card_of_size(16), 8).hours is None


def test_clips_come_from_the_index_then_the_command_then_the_public_set(tmp_path: Path) -> None:
    write_shards(tmp_path, [7])
    packed = stage2("b_32f", f"data.train=['{tmp_path}/train-*.tar']", "data.val=[]")
    assert count_clips(packed, None).train == 240_436  # Not indexed: nothing is read, and the number of classes tells.
    assert main(["index", str(tmp_path / "train-000000.tar")]) == 0
    assert (count_clips(packed, 99).train, count_clips(packed, 99).source) == (7, "the shards' index")
    assert count_clips(stage2("b_32f"), 99).train == 99
    assert count_clips(stage2("b_32f"), 99).video_frames == 300  # The path names Kinetics.
    assert count_clips(packed, 99).video_frames is None
    assert count_clips(stage2("b_32f"), None).source == "Kinetics-400 as it is in use"
    assert count_clips(stage2("b_32f", "data.train=['x.tar']", "model.classes=17"), None).train is None


# --- Search and advice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [5, 99, 100, 101, 350, 351, 1234, 10**6])
@pytest.mark.parametrize("granule", [1, 2])
@pytest.mark.parametrize("start", [2, 8, 64])
def test_the_largest_size_is_found_in_few_traces(limit: int, granule: int, start: int) -> None:
    calls: list[int] = []

    def peak(size: int) -> int:
        calls.append(size)
        return max(100, 10 * size + 50, 25 * size - 400)

    found = largest(peak, limit, granule, start, 4096, max(100, 10 * start + 50, 25 * start - 400))
    sizes = [size for size in range(granule, 4097, granule) if peak(size) <= limit]
    traces = len(calls) - len(range(granule, 4097, granule))
    assert found == (sizes[-1] if sizes else 0)
    assert traces <= 10


@pytest.mark.parametrize(
    ("name", "card"),
    [("h100", "H100"), ("RTX 3090", "RTX3090"), ("3090", "RTX3090"), ("a100-80GB", "A100-80"), ("RTX2080Ti", "2080Ti")],
)
def test_cards_are_found_by_any_usual_name(name: str, card: str) -> None:
    assert find_card(name).name == card


@pytest.mark.parametrize(("name", "hint"), [("A100", "A100-80 or A100-40"), ("H1000", "H100"), ("zzz", "known: ")])
def test_an_unknown_card_is_a_usage_error(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        find_card(name)


def test_peaks_by_the_names_that_drivers_give() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("NVIDIA L40S") == 362.0
    assert peak_tflops("NVIDIA GeForce RTX 2080 Ti") == 54.0
    assert peak_tflops("AMD EPYC") is None
    assert len({card.name for card in CARDS}) == len(CARDS)


# --- The command --------------------------------------------------------------------------------------------------


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


CONTRACT = [
    *("fits", "peak_gib", "peak_by_category"),
    *("max_frames", "max_micro_batch", "total_parameters", "trainable_parameters", "frozen_parameters"),
    *("optimizer_bytes_per_rank", "stage_hours", "gpu_hours", "cache_gib", "checkpoint_gib", "advice"),
]


def test_json_has_the_contracts_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = run_json(capsys, "--recipe", str(ROOT / "recipes/b_32f.yaml"), "--card", "3090", "--ranks", "8")
    assert code == 0
    assert plan.keys() >= set(CONTRACT)
    assert plan["fits"] is True
    assert plan["advice"] == []
    assert sum(plan["peak_by_category"].values()) == pytest.approx(plan["peak_gib"])
    assert plan["max_frames"] >= 1024
    assert plan["max_micro_batch"] == 8
    assert set(plan["stage_hours"]) == {"stage1", "stage2"}
    assert plan["gpu_hours"] == pytest.approx(8 * sum(plan["stage_hours"].values()))
    # One view holds the steps of whole videos of 300 frames, and the 16 of each validation clip.
    assert plan["cache_gib"] == pytest.approx((240_436 * 300 / 4 + 19_796 * 16) * 768 * 2 / GIB)
    assert plan["checkpoint_gib"] > 0


def test_advice_makes_it_fit_and_the_exit_code_is_78(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--recipe", str(ROOT / "recipes/b_32f.yaml"), "--stage", "stage1", "--card", "3090", "--gib", "3.6"]
    code, plan = run_json(capsys, *where)
    assert (code, plan["fits"]) == (78, False)
    [advice] = plan["advice"]
    assert plan["max_micro_batch"] < 8
    sets = [word for flag, word in pairwise(advice.split()) if flag == "--set"]
    assert sets
    code, plan = run_json(capsys, *where, *(part for value in sets for part in ("--set", value)))
    assert (code, plan["fits"], plan["advice"]) == (0, True, [])


def test_the_table_says_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--recipe", str(ROOT / "recipes/demo.yaml"), "--gib", "2", "--clips", "1000"]
    _, plan = run_json(capsys, *where)
    assert main(["plan", *where]) == 0
    table = capsys.readouterr().out
    assert f"{plan['stages']['stage2']['peak_gib']:.2f}" in table
    assert "it fits" in table
    assert "--clips" in table
    ratio = f"cost ratio   {plan['cost_ratio']:.2f} = operations of 10 epochs of 4 frames in stage 1"
    assert f"{ratio} + 4 epochs of 16 frames in stage 2, over those of 4 epochs of 16 frames end to end" in table
    assert "cache        at least " in table  # Nobody says how long the videos are.


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--recipe", "recipes/demo.yaml", "--card", "H10"], 64, "did you mean H100"),
        (["--recipe", "recipes/demo.yaml", "--ranks", "0"], 64, "--ranks must be a number greater than 0"),
        (["--recipe", "recipes/demo.yaml", "--gib", "nan"], 64, "--gib must be a number greater than 0, not nan"),
        (["--recipe", "recipes/demo.yaml", "--gib", "inf"], 64, "--gib must be a number greater than 0, not inf"),
        (["--table4", "--card", "T4"], 64, "leave --card out"),
        (["--table4", "--recipe", "recipes/demo.yaml"], 64, "leave --recipe out"),
        (
            ["--recipe", "recipes/demo.yaml", "--ranks", "2", "--nodes", "2", "--gpus-per-node", "1"],
            64,
            "either --ranks",
        ),
        (["--recipe", "recipes/demo.yaml", "--nodes", "2"], 64, "go together"),
        ([], 64, "needs --recipe"),
        (["--recipe", "recipes/b_32f.yaml", "--stage", "image"], 78, "no such stage"),
        (["--recipe", "recipes/demo.yaml", "--set", "model.patch=7"], 78, "cannot be built"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", *arguments]) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_probe_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", str(ROOT / "recipes/demo.yaml"), "--probe"]) == 64
    assert "there is none here" in capsys.readouterr().err


def test_the_dry_runs_line() -> None:
    line = memory_line([stage2("demo")], 2, torch.device("cpu"))
    assert "GiB a GPU" in line
    assert "no GPU here" in line


def test_a_feature_cache_is_a_stage_with_hours_and_disk() -> None:
    """Four views of videos of 300 frames for clips of 128 x 2: the trunk runs 4 x 300 / 256 times in place of 30."""
    live, cached = recipe("l_128f"), recipe("l_128f_cached")
    stage = stage2("l_128f_cached")
    assert clips_in_a_view(stage, count_clips(stage, None)) == pytest.approx(300 / 256)
    card = find_card("A100-40")
    plans = [plan_recipe(each, card, 8, search=False) for each in (live, cached)]
    before, after = (plan.as_json() for plan in plans)
    assert list(after["stage_hours"]) == ["stage1", "cache", "stage2"]
    views = 4 * 300 / 256 + 19_796 / 240_436
    assert after["stage_hours"]["cache"] == pytest.approx(before["stage_hours"]["stage2"] / 30 * views, rel=0.02)
    assert after["stage_hours"]["stage2"] < 0.02 * before["stage_hours"]["stage2"]
    assert after["gpu_hours"] == pytest.approx(8 * sum(after["stage_hours"].values()))
    assert after["cost_ratio"] < 0.13 < before["cost_ratio"]
    assert after["cache_gib"] == pytest.approx((4 * 300 / 256 * 240_436 + 19_796) * 64 * 1024 * 2 / GIB)
