"""The trunk ahead of the tail: the order of the work, the same features, what is dropped, and streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from trunk_samples import clips, frozen_of, tail_of

from sfa_dist.data.batches.batch import Batch
from sfa_dist.errors import RecipeError
from sfa_dist.models.footprint import StoragePeak, clip_bytes, feature_bytes, overlaps
from sfa_dist.plan.memory import predict
from sfa_dist.recipe.schema import Stage2
from sfa_dist.training.trunk_ahead import TrunkAhead

CPU = torch.device("cpu")


def numbered(number: int, given: Tensor) -> Batch:
    return Batch(torch.zeros(1), torch.ones(1), torch.tensor([number]), clips=given)


def drawn(count: int, seen: list[str]) -> Iterator[Batch]:
    for number in range(count):
        seen.append(f"draw {number}")
        yield numbered(number, clips() + number)


def watched(seen: list[str]) -> TrunkAhead:
    def run(batch: Batch) -> Tensor:
        seen.append(f"trunk {int(batch.ids)}")
        return batch.clips.float()

    return TrunkAhead(run, CPU)


def test_the_next_trunk_comes_before_this_tail() -> None:
    seen: list[str] = []
    ahead = watched(seen)
    for batch in ahead.over(drawn(3, seen)):
        assert torch.equal(ahead.features(batch), batch.clips.float())
        seen.append(f"tail {int(batch.ids)}")
    assert seen == [
        *("draw 0", "draw 1", "trunk 0", "trunk 1", "tail 0"),
        *("draw 2", "trunk 2", "tail 1", "tail 2"),
    ]


def test_several_micro_batches_a_step_hold_the_features_of_two() -> None:
    """All of a step's micro-batches are drawn at once; the trunk is never more than one ahead."""
    seen: list[str] = []
    ahead = watched(seen)
    batches = ahead.over(drawn(5, seen))
    for step in ((0, 1), (2, 3), (4,)):
        taken = [next(batches) for _ in step]
        for number, batch in zip(step, taken, strict=True):
            ahead.features(batch)
            ran = [line for line in seen if line.startswith("trunk")]
            assert len(ran) == min(number + 2, 5)
            assert sum(d.features is not None for d in ahead._drawn) <= 1
    assert next(batches, None) is None
    assert len([line for line in seen if line.startswith("trunk")]) == 5  # Each once.


def test_a_step_that_was_not_trained_is_dropped() -> None:
    seen: list[str] = []
    ahead = watched(seen)
    batches = ahead.over(drawn(4, seen))
    ahead.features(next(batches))
    next(batches)  # Its trunk has run, and no tail takes it.
    third = next(batches)
    assert torch.equal(ahead.features(third), third.clips.float())
    again = ahead.over(drawn(1, seen))
    assert torch.equal(ahead.features(next(again)), clips().float())


def test_a_cpu_waits_for_all_that_it_waits_for() -> None:
    assert watched([]).idle_seconds(0.25) == 0.25


def stage(**keys: object) -> Stage2:
    plain = {
        **{"frames": 8, "model": {"size": "tiny", "classes": 5, "image_size": 16}, "data": {"train": ["x"]}},
        **{"optimizer": {"lr": 0.1}, "schedule": {"epochs": 1}, **keys},
    }
    return Stage2.model_validate(plain)


def test_auto_is_for_cards_and_not_for_offloaded_tokens() -> None:
    tokens = {"adapter": {"placement": "tokens"}, "offload": "on"}
    assert overlaps(stage(), on_card=True)
    assert not overlaps(stage(), on_card=False)
    assert overlaps(stage(overlap="on"), on_card=False)
    assert overlaps(stage(offload="on"), on_card=True)
    assert not overlaps(stage(overlap="off"), on_card=True)
    assert not overlaps(stage(**tokens), on_card=True)
    with pytest.raises(RecipeError, match=r"set stage2\.overlap or stage2\.offload to off"):
        overlaps(stage(overlap="on", **tokens), on_card=True)


# ------------------------------------------------------------------------------------------------ memory


def step_peak(ahead: bool, frames: int = 64) -> int:
    """Bytes beyond weights and clips that a pooled stage 2 takes at its peak in a step in the middle."""
    frozen, tail = frozen_of(False, 8, pooled=True), tail_of(frames, "pooled")
    given = [numbered(number, clips(frames)) for number in range(4)]
    runner = TrunkAhead(lambda batch: frozen(batch.clips), CPU)
    batches = runner.over(iter(given))
    take = runner.features if ahead else lambda batch: frozen(batch.clips)
    tail(take(next(batches))).sum().backward()
    with StoragePeak() as storages:
        tail(take(next(batches))).sum().backward()
    return storages.peak


def test_one_more_micro_batch_of_features_is_all_that_it_takes() -> None:
    features = 2 * 32 * 96 * 4
    assert 0 <= step_peak(True) - step_peak(False) <= features


@pytest.mark.parametrize("placement", ["pooled", "tokens"])
@pytest.mark.parametrize("frames", [16, 64])
def test_the_plan_counts_it(placement: str, frames: int) -> None:
    """One micro-batch of features, and a chunk of the trunk, whose memory stays with its stream."""
    model = {"size": "tiny", "classes": 10, "image_size": 64, "temporal_depth": 2}
    given = {"frames": frames, "model": model, "chunk_frames": 4, "adapter": {"placement": placement}, "offload": "off"}
    on, off = (stage(**given, overlap=way) for way in ("on", "off"))
    more = predict(on).peak_bytes - predict(off).peak_bytes
    pixels, wider = clip_bytes(on), predict(stage(**given | {"chunk_frames": 8}, overlap="on")).peak_bytes
    print(placement, frames, more, feature_bytes(on), pixels)
    assert feature_bytes(on) + pixels < more < feature_bytes(on) + pixels + 2**20
    assert wider > predict(on).peak_bytes
    assert predict(stage(**given)).peak_bytes == predict(on).peak_bytes  # A plan is for a card.


# ------------------------------------------------------------------------------------------------ on a card


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@gpu
def test_streams_give_the_same_features() -> None:
    """Many rounds with work on the main stream that fills and frees memory beside the trunk: a block that is given back
    too early would show."""
    device = torch.device("cuda")
    frozen = frozen_of(False, pooled=True).to(device)
    wanted = [frozen((clips() + number).to(device)) for number in range(50)]
    ahead = TrunkAhead(lambda batch: frozen(batch.clips), device)
    matrix = torch.randn(1024, 1024, device=device)
    for batch in ahead.over(drawn(50, [])):
        features = ahead.features(batch)
        noise = [torch.full_like(features, 7.0) for _ in range(8)]
        matrix = torch.tanh(matrix @ matrix)
        total = features + sum(noise)
        assert torch.equal(total - 56.0, wanted[int(batch.ids)] + 56.0 - 56.0)
    torch.cuda.synchronize()


@pytest.mark.gpu
@gpu
def test_the_trunk_runs_beside_the_tail() -> None:
    """The main stream gets through its own work while a long trunk is still at it."""
    device = torch.device("cuda")
    weight = torch.randn(8192, 8192, device=device)

    def long_trunk(batch: Batch) -> Tensor:
        x = weight
        for _ in range(20):
            x = torch.tanh(x @ weight)
        return x[:1].clone()

    ahead = TrunkAhead(long_trunk, device)
    batches = ahead.over(drawn(3, []))
    ahead.features(next(batches)).sum().item()  # The main stream is empty; trunk 1 has only begun.
    assert ahead.idle_seconds(1.0) == 0.0
    torch.cuda.synchronize()
    assert 0.0 <= ahead.idle_seconds(1.0) <= 1.0
