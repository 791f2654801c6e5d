"""What a plan counts beside the step of one stage: a card that decodes, a feature cache that is filled or read, and
the heads of a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import write_shards
from own_process import apart
from plan_stages import GIB, MIB, ROOT, recipe, stage2

from sfa_dist.data.batches import augment as augmentation
from sfa_dist.data.batches import resizing
from sfa_dist.data.batches.augment import TrainView
from sfa_dist.data.sampling.randomness import sample_rng
from sfa_dist.data.video.gather import SLICE
from sfa_dist.models.footprint import StoragePeak, overlaps
from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.engines.make_engine import make_engine
from sfa_dist.plan.cards import card_of_size, find_card, largest_peak
from sfa_dist.plan.decode_memory import SURFACES, plan_decode
from sfa_dist.plan.extraction_memory import predict_extraction
from sfa_dist.plan.memory import predict, predict_together
from sfa_dist.plan.recipe_plan import members_that_fit, memory_line, plan_recipe
from sfa_dist.recipe.schema import Stage2, sweep_members
from sfa_dist.stages.assemble import assemble_stage2
from sfa_dist.tools.cli import main

ON_CARD = ("data.decode_device=cuda", "data.workers=0")
CACHED = ("stage2.cache.views=2",)
SWEEP = "sweep={model.temporal_depth: [1, 4], seed: [0, 1, 2]}"


# --- A card that decodes ------------------------------------------------------------------------------------------


def test_decoding_on_the_card_comes_on_top_and_says_what_it_assumes() -> None:
    cpu, card = predict(stage2("b_32f")), predict(stage2("b_32f", *ON_CARD))
    assert cpu.decode is None
    assert cpu.by_category["decoder"] == 0
    assert card.decode is not None
    assert card.by_category["decoder"] == card.decode.bytes == card.peak_bytes - cpu.peak_bytes
    few, crop = 8 * 256 * 455 * 3, 32 * 224 * 224 * 3
    assert 2 * few + 2 * crop < card.decode.bytes < 32 * 256 * 455 * 3 * 4
    assert "32 frames of 455x256 pixels (assumed: data.resize at 16:9)" in str(card.decode)
    assert "20 pictures of the decoder's own (assumed)" in str(card.decode)


def test_more_frames_decoded_take_more_in_a_straight_line() -> None:
    sizes = {frames: predict_decode(f"stage2.frames={frames}") for frames in (32, 64, 128, 256)}
    assert sizes[256] - sizes[128] == pytest.approx(2 * (sizes[128] - sizes[64]), rel=0.02)
    assert sizes[128] - sizes[64] == pytest.approx(2 * (sizes[64] - sizes[32]), rel=0.1)
    assert predict_decode("stage2.frames=4096") <= predict_decode("stage2.frames=4096", "data.limits.decoded_mib=8192")
    assert predict_decode("data.limits.decoded_mib=1") < predict_decode()  # A clip that takes more is a bad sample.


def predict_decode(*sets: str) -> int:
    plan = plan_decode(stage2("b_32f", *ON_CARD, *sets))
    assert plan is not None
    return plan.bytes


def test_the_size_of_frames_is_that_of_the_first_clip_where_it_is_here(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    sets = [*ON_CARD, f"data.train=['{tmp_path}/train-*.tar']", "data.val=[]"]
    unknown = plan_decode(stage2("b_32f", *sets))
    assert unknown is not None
    assert "assumed" in unknown.size.source  # Nothing is indexed: nothing is read.
    assert main(["index", str(tmp_path / "train-000000.tar")]) == 0
    known = plan_decode(stage2("b_32f", *sets, "data.resize=260"))
    assert known is not None
    assert (known.size.height, known.size.width) == (32, 32)
    assert known.size.source == "as the first training clip's"


@pytest.mark.parametrize("augment", [{"color": 1.0, "gray": 1.0, "flip": 1.0}, {"color": 0.0, "gray": 0.0}])
def test_what_is_traced_is_what_augmentation_takes(augment: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Real storages, of as many frames at a time as on a card."""
    for module in (resizing, augmentation):
        monkeypatch.setattr(module, "frames_at_once", lambda count, *_: min(count, resizing.FRAMES_ON_A_CARD))
    sets = [f"augment.{key}={value}" for key, value in augment.items()]
    stage = stage2("b_32f", *ON_CARD, *sets, "augment.scale_jitter=[1.2, 1.2]")
    plan = plan_decode(stage)
    assert plan is not None

    with StoragePeak() as storages:
        view = TrainView(256, 224, stage.augment, sample_rng(0, 0, 0, "augment"))
        kept = torch.empty((32, 224, 224, 3), dtype=torch.uint8)
        for start in range(0, 32, SLICE):
            stored = torch.zeros((2 * SLICE, plan.size.height, plan.size.width, 3), dtype=torch.uint8)
            kept[start : start + SLICE] = view.shrink(stored[:SLICE])
            del stored
        view.finish(kept)
    own = SURFACES * plan.size.height * plan.size.width * 3 // 2
    assert plan.bytes - own == pytest.approx(storages.peak, rel=0.03)


def test_features_are_not_decoded() -> None:
    assert plan_decode(stage2("b_32f", *ON_CARD, *CACHED)) is None
    assert plan_decode(stage2("b_32f", *ON_CARD, *CACHED, "stage2.cache.live_fraction=0.1")) is not None
    filling = predict_extraction(stage2("b_32f", *ON_CARD, *CACHED), 300)
    assert filling.decode is not None
    assert filling.decode.frames == 300
    block = predict_extraction(stage2("b_32f", *ON_CARD, *CACHED), 10**6).decode
    assert block is not None
    assert 3 * block.frames * block.size.height * block.size.width <= 256 * MIB


def test_the_page_and_the_json_tell_of_the_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--recipe", str(ROOT / "recipes/demo.yaml"), "--gib", "8", "--clips", "100"]
    assert main(words) == 0
    assert "decoder" not in capsys.readouterr().out
    on_card = [word for key in ON_CARD for word in ("--set", key)]
    assert main([*words, *on_card]) == 0
    page = capsys.readouterr().out
    assert "decoder, GiB" in page
    assert "decoder      stage2: " in page
    assert main([*words, *on_card, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["stages"]["stage2"]
    assert "(assumed: data.resize at 16:9)" in told["decoder"]
    assert told["peak_by_category"]["decoder"] > 0


# --- A feature cache ----------------------------------------------------------------------------------------------


def test_a_stage_that_reads_features_holds_no_trunk_and_its_filling_holds_nothing_else() -> None:
    live, cached = predict(stage2("g_48f")), predict(stage2("g_48f", *CACHED))
    assert live.by_category["frozen"] > 1.8 * GIB
    assert cached.by_category["frozen"] == 0
    assert cached.frozen_parameters == live.frozen_parameters
    assert cached.peak_bytes < live.peak_bytes - live.by_category["frozen"]
    filling = predict_extraction(stage2("g_48f", *CACHED), 300)
    assert filling.by_category["frozen"] == live.by_category["frozen"]
    assert filling.by_category["optimizer"] == filling.by_category["parameters"] == 0
    assert filling.peak_bytes < live.peak_bytes
    partly = predict(stage2("g_48f", *CACHED, "stage2.cache.refresh=0.5"))
    assert partly.by_category["frozen"] == live.by_category["frozen"]


def test_it_fits_where_stage_2_and_the_filling_fit_one_after_the_other() -> None:
    """Together, as they would be live, trunk and tail take more than this card has."""
    loaded = recipe("g_lt4_48f", *CACHED, "stage1.weights=given.safetensors")
    stage = loaded.stage2
    assert stage is not None
    parts = [predict(stage), predict_extraction(stage, 300)]
    most = max(part.peak_bytes for part in parts)
    card = card_of_size(1.001 * (1.08 * most / GIB + 1))
    assert predict(stage.model_copy(update={"cache": None})).peak_bytes > largest_peak(card)
    plan = plan_recipe(loaded, card, 1, search=False)
    assert plan.fits
    told = plan.as_json()
    assert list(told["stages"]) == ["stage2", "cache"]
    small = plan_recipe(loaded, card_of_size(2.0), 1, search=False)
    assert not small.fits
    assert any(line.startswith("cache needs") for line in small.advice())


# --- A sweep ------------------------------------------------------------------------------------------------------


def swept(*sets: str) -> Any:
    return recipe("l_128f_cached", "model.temporal_depth=4", SWEEP, *sets)


def test_all_heads_of_a_sweep_count() -> None:
    loaded = swept()
    heads = [member.stage for member in sweep_members(loaded)]
    alone = [predict(head) for head in heads]
    together = predict_together(heads)
    assert together.trainable_parameters == sum(plan.trainable_parameters for plan in alone)
    assert together.optimizer_bytes_per_rank == sum(plan.optimizer_bytes_per_rank for plan in alone)
    assert together.by_category["optimizer"] == sum(plan.by_category["optimizer"] for plan in alone)
    assert together.by_category["parameters"] == sum(plan.by_category["parameters"] for plan in alone)
    assert sum(together.by_category.values()) == together.peak_bytes
    assert together.peak_bytes < sum(plan.peak_bytes for plan in alone)
    card = card_of_size(1.05 * max(plan.peak_bytes for plan in alone) / GIB * 1.08 + 1)
    plan = plan_recipe(loaded, card, 1, only="stage2", search=False)
    assert not plan.fits
    [advice] = [line for line in plan.advice() if line.startswith("stage2")]
    few = members_that_fit(heads, card, 1)
    assert 0 < few < len(heads)
    assert f"6 members train together, the first {few} fit together" in advice
    assert (
        predict_together(heads[:few]).peak_bytes <= largest_peak(card) < predict_together(heads[: few + 1]).peak_bytes
    )
    assert "GiB a GPU" in memory_line(heads, 1, torch.device("cpu"))


def test_times_and_disk_of_a_sweep_are_those_of_all_heads() -> None:
    card = card_of_size(80)
    whole, alone = swept(), recipe("l_128f_cached", "model.temporal_depth=4")
    sweep, one = (plan_recipe(each, card, 1, search=False, micro_seconds={"stage2": 1.0}) for each in (whole, alone))
    assert sweep.stages[-1].duration.hours == pytest.approx(6 * (one.stages[-1].duration.hours or 0))
    assert sweep.stages[-1].duration.steps == one.stages[-1].duration.steps
    assert sweep.as_json()["stages"]["stage2"]["heads"] == 6
    assert sweep.as_json()["cost_ratio"] > one.as_json()["cost_ratio"]


def owned_by(heads: list[Stage2]) -> int:
    """Bytes of masters and moments of real engines, ZeRO 2 on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it.
        runtime = parallel_runtime.start({})
        tails = [assemble_stage2(head, None, "", "none").trainable for head in heads]
        engines = [make_engine(tail, head, 1, runtime.device) for tail, head in zip(tails, heads, strict=True)]
        for engine in engines:
            engine.make_optimizer_state(1)
        owned = sum(engine.optimizer_bytes() for engine in engines)
        parallel_runtime.stop()
    return owned


def test_engines_of_several_heads_own_what_is_planned() -> None:
    """Two of them in one process, which no other engine has been in: DeepSpeed keeps the first process group."""
    small = ["model.size=tiny", "model.image_size=32", "data.resize=32", "model.temporal_depth=2"]
    loaded = recipe("l_128f_cached", *small, "optimizer.name=adamw", "sweep={adapter.hidden: [0.5, 1.0]}")
    heads = [member.stage for member in sweep_members(loaded)]
    owned = apart(owned_by, heads)
    plan = predict_together(heads)
    assert plan.optimizer_bytes_per_rank == owned
    assert plan.by_category["optimizer"] == pytest.approx(owned, rel=1e-3)


# --- What a run would refuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "ranks", "says"),
    [
        (["engine.name=fsdp", "engine.shard_ranks=4"], "6", "engine.shard_ranks is 4, which does not divide the 6"),
        (["engine.reduction=tree"], "3", "a number of ranks that is a power of two"),
        (["stage2.frames=100000"], "1", "frames 100000: a plan traces clips of at most"),
    ],
)
def test_what_the_run_would_refuse_has_no_plan(
    sets: list[str], ranks: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for key in sets for word in ("--set", key)]
    assert main(["plan", "--recipe", str(ROOT / "recipes/b_32f.yaml"), "--ranks", ranks, *words]) == 78
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_fp8_on_a_card_without_it_is_told() -> None:
    loaded = recipe("h_96f", "stage2.trunk_precision=fp8")
    plans = [plan_recipe(loaded, find_card(name), 8, only="stage2", search=False) for name in ("A100-40", "H100")]
    assert [[line for line in plan.advice() if "fp8" in line] for plan in plans] == [
        ["A100-40 has no fp8 units, so the run is refused: set stage2.trunk_precision=int8"],
        [],
    ]


@pytest.mark.parametrize(
    ("name", "only", "sets", "gib", "ranks"),
    [
        ("b_32f", "stage1", ["engine.zero=0", "engine.precision=fp32", "compile=true"], 2.75, 4),
        ("h_96f", "stage2", ["stage2.adapter.placement=tokens", "stage2.overlap=on", "stage2.offload=off"], 3.28, 8),
        ("b_32f", "stage1", ["engine.reduction=tree", "engine.precision=fp32"], 3.4, 4),
    ],
)
def test_advice_is_what_a_recipe_takes(name: str, only: str, sets: list[str], gib: float, ranks: int) -> None:
    plan = plan_recipe(recipe(name, *sets), card_of_size(gib), ranks, only=only)
    assert not plan.fits
    advice = plan.stages[0].advice
    assert advice is not None
    changed = getattr(recipe(name, *sets, *advice.sets), only).on_ranks(advice.ranks)
    if isinstance(changed, Stage2):
        assert overlaps(changed, on_card=True) in (True, False)  # And refuses nothing.
    assert not (changed.compile and changed.engine.zero == 3)
    assert predict(changed, advice.ranks).peak_bytes <= largest_peak(card_of_size(gib))


def test_a_trunk_in_eight_bits_is_not_held_against_a_change() -> None:
    """Its weights are half of what bf16's would be, and fit."""
    loaded = recipe("g_48f", "stage2.trunk_precision=int8", "optimizer.name=adamw", "stage1.weights=given.safetensors")
    stage = loaded.stage2
    assert stage is not None
    offloaded = stage.model_copy(update={"engine": stage.engine.model_copy(update={"cpu_offload": True})})
    gib = 1.08 * 1.02 * predict(offloaded).peak_bytes / GIB + 1
    [advice] = plan_recipe(loaded, card_of_size(gib), 1, only="stage2").advice()
    assert "stage2.engine.cpu_offload=true" in advice


def test_one_rank_is_planned_as_it_runs() -> None:
    """With nothing to shard, ZeRO 2 runs as ZeRO 0."""
    one, keeps = (
        plan_recipe(recipe("b_32f", *sets), card_of_size(80), 1, only="stage2", search=False)
        .stages[0]
        .memory.peak_bytes
        for sets in ([], ["deepspeed.zero_optimization.stage=2"])
    )
    assert one == predict(stage2("b_32f", "engine.zero=0").on_ranks(1)).peak_bytes
    assert keeps == predict(stage2("b_32f", "engine.zero=2")).peak_bytes != one
