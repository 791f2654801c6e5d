"""The order of samples: exactly once, the same for any number of ranks, and fast at any scale."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from data_samples import batch_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sfa_dist.data.sampling.clip_sampling import frame_indices, random_offset, view_offsets
from sfa_dist.data.sampling.randomness import sample_rng
from sfa_dist.data.sampling.sample_plan import SamplePlan, splitmix64
from sfa_dist.recipe.blocks import BatchBlock

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


def rank_ids(plan: SamplePlan, epoch: int, step: int, world: int, micro: int) -> np.ndarray:
    parts = [
        plan.micro_batch_ids(epoch, step, rank, world, micro, part)
        for rank in range(world)
        for part in range(plan.accumulation(world, micro))
    ]
    return np.concatenate(parts)


@pytest.mark.fault(44, 67)
@settings(max_examples=60, deadline=None)
@given(
    sizes, st.integers(1, 20), st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(0, 3), st.booleans()
)
def test_each_sample_once_and_same_batches_on_any_ranks(sizes, batch, window, world, micro, epoch, shuffle):
    plan = SamplePlan(tuple(sizes), 7, batch, window, shuffle)
    seen = []
    for step in range(plan.steps_per_epoch):
        ids = batch_ids(plan, epoch, step)
        assert ids.shape == (batch,)
        held = rank_ids(plan, epoch, step, world, micro)
        # the slots of all ranks, laid end to end, are the global batch: the same set and even the same order
        np.testing.assert_array_equal(held[:batch], ids)
        assert (held[batch:] == -1).all()
        seen.append(ids[ids >= 0])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(sum(sizes)))
    assert (plan.ids_at(epoch, np.array([-1, sum(sizes)])) == -1).all()


def test_epochs_and_seeds_differ_and_plain_order_does_not():
    first = [batch_ids(SamplePlan((50, 50), seed, 100, 1), epoch, 0) for seed in (0, 1) for epoch in (0, 1)]
    assert len({ids.tobytes() for ids in first}) == 4
    np.testing.assert_array_equal(batch_ids(SamplePlan((5, 5), 3, 4, 1, shuffle=False), 1, 2), [8, 9, -1, -1])


def test_reads_stay_inside_a_window():
    plan = SamplePlan((10,) * 20, 0, 1, 4)
    ids = plan.ids_at(0, np.arange(200))
    assert all(len(np.unique(ids[start : start + 40] // 10)) == 4 for start in range(0, 200, 40))


def test_order_is_pinned():
    """A run must be resumable by later versions: this order may change only together with PLAN_VERSION."""
    assert int(splitmix64(np.array([0x9E3779B97F4A7C15], np.uint64))[0]) == 0xE220A8397B1DCDAF  # reference value
    assert batch_ids(SamplePlan((3, 4, 5), 0, 12, 2), 0, 0).tolist() == [8, 7, 9, 6, 5, 10, 4, 3, 11, 0, 1, 2]


@pytest.mark.fault(44)
def test_single_sample_and_small_sets():
    plan = SamplePlan((1,), 0, 64, 64)
    assert plan.steps_per_epoch == 1
    assert plan.micro_batch_ids(0, 0, 0, 4, 2, 0).tolist() == [0, -1]
    assert plan.micro_batch_ids(0, 0, 3, 4, 2, 0).tolist() == [-1, -1]
    with pytest.raises(ValueError, match="at least one sample"):
        SamplePlan((0, 0), 0, 4, 4)


# A DataLoader deals its k-th item to worker k % workers (`test_a_loader_deals_items_in_turn`); 0: the rank reads.
WORKERS = range(17)
# Few and many ranks, some that divide nothing; micro-batches that do not fill the last rank, and one rank with many.
WORLDS = {1: 64, 2: 4096, 3: 5, 7: 8192, 64: 32, 1000: 3, 1024: 8, 4095: 1, 4096: 2}


def dealt(items: int, workers: int) -> list[np.ndarray]:
    """The items of each worker."""
    return [np.arange(first, items, max(1, workers)) for first in range(max(1, workers))]


def test_ten_million_samples_are_each_seen_once_by_any_ranks_and_workers():
    """A whole epoch of every rank, in arrays. The last batch is not full, nor are all shards of one size."""
    sizes = np.tile([1000, 999, 1002, 998], 2500)
    plan = SamplePlan(sizes, 5, 8192, 64)
    count = int(sizes.sum())
    assert count > 9_990_000
    assert count % plan.batch_size
    # 1. Each place of the epoch holds another sample, and all are there.
    seen = np.zeros(count, dtype=bool)
    for start in range(0, count, 1 << 19):
        seen[plan.ids_at(3, np.arange(start, min(start + (1 << 19), count)))] = True
    assert seen.all()
    # 2. All micro-batches of all ranks, as their workers take them, hold each place once; the rest is padding.
    places_in_all = plan.steps_per_epoch * plan.batch_size
    for number, (world, micro) in enumerate(WORLDS.items()):
        items = plan.steps_per_epoch * plan.accumulation(world, micro)
        held = np.zeros(places_in_all, dtype=bool)
        holders = 0
        for mine in dealt(items, workers=(0, 1, 2, 3, 5, 8, 13, 16, 7)[number]):
            for some in np.array_split(mine, -(-len(mine) * world * micro // (1 << 21)) or 1):  # 16 MiB at a time
                places = plan.item_positions(some, np.arange(world)[:, None], world, micro)
                places = places[places >= 0]
                holders += len(places)
                held[places] = True
        assert holders == places_in_all, world
        assert held.all(), world
        # 3. ... and so they do for any other number of workers.
        for workers in WORKERS:
            order = np.concatenate(dealt(items, workers))
            np.testing.assert_array_equal(np.bincount(order, minlength=items), 1)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 20), st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.sampled_from(WORKERS))
def test_item_by_item_as_the_loader_asks_for_them(sizes, batch, window, world, micro, workers):
    plan = SamplePlan(tuple(sizes), 1, batch, window)
    seen = []
    for rank in range(world):
        items = plan.steps_per_epoch * plan.accumulation(world, micro)
        for item in np.concatenate(dealt(items, workers)).tolist():
            ids = plan.ids_at(2, plan.item_positions(item, rank, world, micro))
            step, part = divmod(item, plan.accumulation(world, micro))
            np.testing.assert_array_equal(ids, plan.micro_batch_ids(2, step, rank, world, micro, part))
            seen += ids[ids >= 0].tolist()
    assert sorted(seen) == list(range(sum(sizes)))


class WhoReads(Dataset):
    def __getitem__(self, item: int) -> tuple[int, int]:
        info = get_worker_info()
        assert info is not None
        return item, info.id


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_loader_deals_items_in_turn(workers):
    loader = DataLoader(WhoReads(), batch_size=None, sampler=range(5, 16), num_workers=workers)
    assert [tuple(each) for each in loader] == [(item, (item - 5) % workers) for item in range(5, 16)]


def test_a_late_rank_of_many_finds_its_place_at_once():
    """No array of the size of the data set is made: a step deep in an epoch touches one window or two."""
    plan = SamplePlan((1000,) * 10_000, 0, 8192, 64)
    step = [plan.micro_batch_ids(3, 100, rank, 4096, 2, 0) for rank in range(4096)]
    np.testing.assert_array_equal(np.concatenate(step), batch_ids(plan, 3, 100))
    tracemalloc.start()
    plan.micro_batch_ids(4, 1200, 4095, 4096, 2, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20  # an array of all ids would be 80 MB


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("size", "micro"), [(64, 8), (64, 1), (64, 64), (48, 5), (7, 3)])
def test_one_gpu_or_many_follow_the_same_schedule_on_the_same_batches(size, micro, paired):
    """The recipe's batch on 1 to 130 ranks: as many steps, each of the same clips, and no rank idles that need not."""
    plan = SamplePlan([300, 41], 0, size, 2, paired=paired)
    expected = [set(batch_ids(plan, 3, step).tolist()) - {-1} for step in range(plan.steps_per_epoch)]
    for world in (1, 2, 3, 5, 8, 16, 64, 130):
        batch = BatchBlock(size=size, micro=micro).on_ranks(world)
        held, accumulation = batch.micro, batch.accumulation(world)
        assert accumulation == BatchBlock(size=size, micro=micro).accumulation(world)
        assert (held <= micro, held * accumulation < size / world + accumulation) == (True, True)
        for step in (0, plan.steps_per_epoch - 1):
            seen = [
                sample
                for rank in range(world)
                for part in range(accumulation)
                for sample in plan.micro_batch_ids(3, step, rank, world, held, part).tolist()
                if sample >= 0
            ]
            assert sorted(seen) == sorted(expected[step])


@pytest.mark.fault(51)
def test_short_videos_loop_and_long_ones_do_not():
    assert frame_indices(5, 8, 1, 0).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert frame_indices(5, 4, 2, 3).tolist() == [3, 0, 2, 4]  # as tiling 0..4 and taking 3, 5, 7, 9 of it
    assert frame_indices(100, 4, 2, 10).tolist() == [10, 12, 14, 16]
    assert frame_indices(9, 4, 0, 6).tolist() == [6, 6, 6, 6]
    tiled = np.tile(np.arange(7), 10)
    np.testing.assert_array_equal(frame_indices(7, 16, 3, 5), tiled[5 : 5 + 48 : 3])


def test_views_are_spread_over_the_video():
    assert view_offsets(100, 32, 2, 1) == [18]
    assert view_offsets(100, 32, 2, 4) == [0, 12, 24, 36]
    assert view_offsets(10, 32, 2, 3) == [0, 0, 0]
    assert view_offsets(9, 8, 0, 1) == [4]  # the middle frame
    assert view_offsets(9, 8, 0, 2) == [0, 8]


@pytest.mark.parametrize(("length", "stride", "last"), [(100, 2, 85), (10, 2, 0), (10, 0, 9), (15, 2, 0), (14, 2, 0)])
def test_random_offset_keeps_the_clip_inside_where_it_can(length, stride, last):
    """Where it cannot, a looped clip begins at the first frame, as DMVR's does: not in the middle of what happens."""
    offsets = {random_offset(sample_rng(0, 0, n, "clip"), length, 8, stride) for n in range(2000)}
    assert min(offsets) == 0
    assert max(offsets) == last
