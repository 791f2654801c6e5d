"""Batches that come from loader processes are those that are made in this one, however fast the workers are."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from sfa_dist.data.batches.batch import Batch, Mix
from sfa_dist.data.batches.loader import Batches, make_loader
from sfa_dist.data.batches.transport import SMALL_BYTES, Sender, SharedTensor
from sfa_dist.data.shards.shard_index import SampleIndex

ITEMS = 40


def empty_index() -> SampleIndex:
    none = np.zeros(0, dtype=np.int64)
    columns = dict.fromkeys(("shard", "offset", "size", "crc32", "label"), none)
    return SampleIndex(shards=(), shard_sha256=(), keys=[], suffix=[], **columns)


class Numbered(Batches):
    """Item k is full of k: large and small tensors of three types, of a size that changes from item to item."""

    def __getitem__(self, item: int) -> Batch:
        rows = 1 + (item * 7) % 5
        return Batch(
            labels=torch.full((rows,), item),
            weights=torch.full((2, 3), item, dtype=torch.bfloat16),
            ids=torch.arange(rows),
            clips=torch.full((rows, 3, SMALL_BYTES), item, dtype=torch.uint8).transpose(0, 1),
            features=torch.full((rows, 40, 256), item, dtype=torch.bfloat16),
            mix=Mix(torch.full((rows,), item), torch.full((SMALL_BYTES,), item / 2)) if item % 3 else None,
            bad=[("a key", f"reason {item}")] * (item % 2),
            looped=item,
        )


def assert_same(mine: Batch | Mix, wanted: Batch | Mix) -> None:
    assert type(mine) is type(wanted)
    for name, value in vars(wanted).items():
        own = getattr(mine, name)
        if isinstance(value, torch.Tensor):
            assert own.dtype == value.dtype
            assert torch.equal(own, value), name
        elif isinstance(value, Mix):
            assert_same(own, value)
        else:
            assert own == value


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 3), (3, 2)])
def test_batches_of_workers_are_those_of_this_process(workers: int, prefetch: int) -> None:
    batches = Numbered(empty_index(), workers)
    kept = []
    for batch in make_loader(batches, range(ITEMS), workers, pin_memory=False, prefetch_factor=prefetch):
        time.sleep(0.002)  # Workers are ahead by all that they may be, so a buffer used too early would show.
        kept.append(batch)
    assert len(kept) == ITEMS
    for item, batch in enumerate(kept):
        assert_same(batch, batches[item])


def test_a_buffer_travels_once_and_is_used_again() -> None:
    batches, send = Numbered(empty_index()), Sender(prefetch_factor=1)
    sent = [send(batches[4])["clips"] for _ in range(6)]
    assert all(isinstance(tensor, SharedTensor) for tensor in sent)
    assert [tensor.buffer is not None for tensor in sent] == [True] * 3 + [False] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_of_workers_are_pinned_for_a_gpu() -> None:
    batches = Numbered(empty_index(), 1)
    for item, batch in enumerate(make_loader(batches, range(4), 1, pin_memory=True, prefetch_factor=2)):
        assert_same(batch, batches[item])
        assert batch.features.is_pinned()
