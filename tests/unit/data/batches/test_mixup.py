"""Mixup against a computation by hand: pairs, shares, pixels and loss, on any ranks, and never with what is no clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_samples import batch_ids, video_bytes, write_shard, write_shards
from pydantic import ValidationError

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.mixup import beta_share, blend, draw_share, mirrored
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import train_loader
from sfa_dist.data.sampling.randomness import sample_rng
from sfa_dist.data.sampling.sample_plan import SamplePlan
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.errors import RecipeError
from sfa_dist.models.loss import mixed_loss_sum
from sfa_dist.recipe.blocks import (
    AugmentBlock,
    BatchBlock,
    DataBlock,
    MixupBlock,
    ModelBlock,
    OptimizerBlock,
    ScheduleBlock,
)
from sfa_dist.recipe.schema import StageBlock

DATA = DataBlock(stride=1, resize=32, workers=0, decoder="pyav")
ALPHA = 0.3


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """11 clips, so that the second global batch of 6 has one empty slot."""
    return load_index(write_shards(tmp_path_factory.mktemp("shards"), [4, 4, 3]))


def train(index: SampleIndex, over: str | None = "global", micro: int = 6, ranks: int = 1, **options: int) -> list:
    """The batches of an epoch by rank, one after the other; plain without `over`."""
    mixup = MixupBlock(alpha=ALPHA, over=over) if over else None
    augment, batch = AugmentBlock(mixup=mixup), BatchBlock(size=6, micro=micro)
    settings = LoaderSettings(DATA, batch, augment, frames=4, crop=24, seed=3, world_size=ranks)
    epoch = {"epoch": 1, **options}
    return [list(train_loader(index, replace(settings, rank=rank), **epoch)) for rank in range(ranks)]


def by_id(batches: list[Batch], *names: str) -> dict[int, tuple[torch.Tensor, ...]]:
    return {
        int(sample): tuple(getattr(batch if hasattr(batch, name) else batch.mix, name)[row] for name in names)
        for batch in batches
        for row, sample in enumerate(batch.ids)
        if sample >= 0
    }


def test_pairs_shares_and_pixels_over_the_global_batch(index: SampleIndex) -> None:
    plain = by_id(train(index, None)[0], "clips")
    plan = SamplePlan(index.shard_sizes, 3, 6, DATA.shuffle_shards)
    [batches] = train(index)
    for step, batch in enumerate(batches):
        ids = batch_ids(plan, 1, step).tolist()
        share = beta_share(sample_rng(3, 1, step, "mixup"), ALPHA)
        rows = by_id([batch], "clips", "partners", "shares", "labels")
        assert sorted(rows) == sorted(sample for sample in ids if sample >= 0)
        for sample, other in zip(ids, reversed(ids), strict=True):
            if sample < 0:
                continue
            clip, partner, kept, label = rows[sample]
            assert label == index.label[sample]
            if other < 0:  # The empty slot's pair stays what it is.
                assert (float(kept), torch.equal(clip, plain[sample][0])) == (1.0, True)
                continue
            expected = share * plain[sample][0].double() + (1 - share) * plain[other][0].double()
            assert (clip.double() - expected).abs().max() <= 0.51  # Half a level of rounding.
            assert (int(partner), float(kept)) == (index.label[other], pytest.approx(share))
    assert {len(batch.ids) for batch in batches} == {6}
    assert sum(int((batch.mix.shares < 1).sum()) for batch in batches) == 10


def test_over_a_device_each_micro_batch_is_its_own(index: SampleIndex) -> None:
    plain = by_id(train(index, None)[0], "clips")
    batches = [batch for rank in train(index, "device", micro=3, ranks=2) for batch in rank]
    shares = set()
    for number, batch in enumerate(batches):
        ids = batch.ids.tolist()
        assert len(ids) == 3
        rank, step = divmod(number, 2)
        share = draw_share(ALPHA, 3, 1, step, rank)
        for row, (sample, other) in enumerate(zip(ids, reversed(ids), strict=True)):
            if min(sample, other) < 0:
                continue
            expected = share * plain[sample][0].double() + (1 - share) * plain[other][0].double()
            assert (batch.clips[row].double() - expected).abs().max() <= 0.51
            shares.add(float(batch.mix.shares[row]))
    assert len(shares) == 4


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (3, 1), (2, 3), (1, 6), (4, 2)])
def test_ranks_and_micro_batches_do_not_matter(index: SampleIndex, micro: int, ranks: int) -> None:
    names = ("clips", "labels", "partners", "shares")
    expected = by_id(train(index)[0], *names)
    found = by_id([batch for rank in train(index, micro=micro, ranks=ranks) for batch in rank], *names)
    assert found.keys() == expected.keys()
    for sample, values in found.items():
        assert all(torch.equal(a, b) for a, b in zip(values, expected[sample], strict=True)), sample


def test_it_goes_on_where_it_stopped(index: SampleIndex) -> None:
    [whole] = train(index, micro=2)
    [rest] = train(index, micro=2, start_step=1)
    for one, two in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.clips, two.clips)
        assert all(torch.equal(getattr(one.mix, key), getattr(two.mix, key)) for key in ("partners", "shares"))
    [other] = train(index, micro=2, epoch=2)
    drawn = [{float(batch.mix.shares.min()) for batch in batches} - {1.0} for batches in (whole, other)]
    assert drawn[0].isdisjoint(drawn[1])


def test_an_even_micro_batch_holds_whole_pairs() -> None:
    """So no clip is decoded twice; and the plan with pairs has the same global batches."""
    for size, samples in ((6, 11), (7, 20), (64, 200)):
        plain, paired = (SamplePlan([samples], 0, size, 4, paired=paired) for paired in (False, True))
        for ranks, micro in ((1, 2), (2, 2), (3, 4), (1, size)):
            batch = BatchBlock(size=size, micro=micro)
            seen = []
            for item in range(batch.accumulation(ranks)):
                for rank in range(ranks):
                    places = paired.item_positions(item, rank, ranks, micro)
                    seen += [place for place in places.tolist() if place >= 0]
                    if micro % 2 == 0:
                        assert set(mirrored(places, size)) == set(places)
            assert sorted(seen) == list(range(size))
        assert set(batch_ids(paired, 0, 1)) == set(batch_ids(plain, 0, 1))


def test_what_is_no_clip_is_not_mixed_in(tmp_path: Path) -> None:
    """A bad clip's pair keeps itself, whichever rank holds the bad one, and it is told once."""
    good = video_bytes(8)
    samples = [(f"clip{n}", good if n != 2 else b"no video", n % 3) for n in range(6)]
    index = load_index([write_shard(tmp_path / "train-000000.tar", samples)])
    for micro, ranks in ((6, 1), (1, 1), (3, 2), (1, 3)):
        batches = [batch for rank in train(index, micro=micro, ranks=ranks) for batch in rank]
        rows = by_id(batches, "shares", "weights", "clips")
        plan = SamplePlan(index.shard_sizes, 3, 6, DATA.shuffle_shards)
        ids = batch_ids(plan, 1, 0).tolist()
        pair = ids[5 - ids.index(2)]
        assert {sample for sample, (share, *_) in rows.items() if float(share) == 1.0} == {2, pair}
        assert (float(rows[2][1]), rows[2][2].any(), float(rows[pair][1])) == (0.0, False, 1.0)
        assert [key for batch in batches for key, _ in batch.bad] == ["train-000000.tar/clip2"]


def test_the_loss_of_two_labels_is_that_of_the_mixed_target() -> None:
    """share x loss(labels) + (1 - share) x loss(partners) is cross-entropy with the official mixed, smoothed target."""
    rng = torch.Generator().manual_seed(0)
    logits, shares = torch.randn(5, 7, generator=rng), torch.rand(5, generator=rng)
    labels, partners = torch.randint(0, 7, (2, 5), generator=rng)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    mixed = mixed_loss_sum(logits, labels, partners, shares, weights, 0.3)
    target = shares[:, None] * F.one_hot(labels, 7) + (1 - shares[:, None]) * F.one_hot(partners, 7)
    target = target * 0.7 + 0.3 / 7
    torch.testing.assert_close(mixed, -((target * logits.log_softmax(1)).sum(1) * weights).sum())


def test_blends_are_rounded_and_a_share_of_one_changes_nothing() -> None:
    own, other = (torch.tensor(values, dtype=torch.uint8) for values in ([0, 255, 10, 200], [255, 0, 20, 201]))
    assert blend(own, other, 0.25).tolist() == [191, 64, 18, 201]  # 191.25, 63.75, 17.5 to even, 200.75
    assert blend(own, other, 1.0) is own
    assert blend(own.bfloat16(), other.bfloat16(), 0.5).dtype == torch.bfloat16
    features = own.float()
    assert blend(features, other.float(), 0.5).tolist() == [127.5, 127.5, 15, 200.5]
    assert torch.equal(features, own.float())  # The clip that was mixed is still needed as it was.


def test_shares_are_of_a_beta_distribution() -> None:
    for alpha in (0.1, 0.3, 1.0):
        draws = np.array([beta_share(sample_rng(0, 0, n, "mixup"), alpha) for n in range(4000)])
        assert ((draws >= 0) & (draws <= 1)).all()
        assert draws.mean() == pytest.approx(0.5, abs=0.03)
        assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)  # of Beta(alpha, alpha)


def stage(micro: int, over: str) -> StageBlock:
    return StageBlock(
        frames=4,
        model=ModelBlock(size="tiny", classes=3),
        data=DATA,
        augment=AugmentBlock(mixup=MixupBlock(alpha=ALPHA, over=over)),
        batch=BatchBlock(size=8, micro=micro),
        optimizer=OptimizerBlock(lr=0.1),
        schedule=ScheduleBlock(epochs=1),
    )


def test_one_clip_at_a_time_has_no_pair_on_its_device() -> None:
    assert stage(4, "device").on_ranks(4).batch.micro == 2
    for micro, ranks in ((1, 1), (4, 8)):
        with pytest.raises(RecipeError, match="use over: global"):
            stage(micro, "device").on_ranks(ranks)
        assert stage(micro, "global").on_ranks(ranks).batch.micro == 1
    with pytest.raises(ValidationError, match="alpha"):
        MixupBlock(alpha=0.0)
