"""Which sample is at which position of an epoch: pure arithmetic, the same for any number of ranks and workers.

An epoch is ordered in two steps. The shards are permuted and cut into windows of `shuffle_shards` shards; then the
samples inside each window are permuted. Reads stay within a few shards at a time, and no array of the size of the data
set is made: binary search over the windows finds a position, and only the windows that are used are built.

A permutation is the stable sort of a keyed 64-bit hash (splitmix64, Steele et al. 2014), not a library's shuffle. The
order does not depend on the version of numpy, so a run can be resumed years later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

PLAN_VERSION = 1  # Increase it when the same seed gives another order.
Ids = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SHARDS, _SAMPLES = 1, 2  # Part of a permutation's key, so that the two never share one.


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser, a bijection on 64-bit words: uint64 array in, uint64 array of the same shape out."""
    with np.errstate(over="ignore"):
        mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def hash_key(*parts: int) -> int:
    """Folds integers into one 64-bit key; the order of the parts counts."""
    key = 0
    for part in parts:
        word = np.array([(key * _GOLDEN + part + 1) & _MASK], dtype=np.uint64)
        key = int(splitmix64(word)[0])
    return key


def permuted(ids: Ids, *key: int) -> Ids:
    """`ids` (distinct, int64) in the order of their keyed hash. The hash is a bijection, so there are no ties."""
    with np.errstate(over="ignore"):
        words = ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(hash_key(*key))
    return ids[np.argsort(splitmix64(words), kind="stable")]


@dataclass(frozen=True, eq=False)  # Compared by identity, which makes it a cheap cache key.
class SamplePlan:
    """The order of all epochs.

    shard_sizes: samples in each shard. Sample ids count through the shards in this order.
    batch_size: the global batch, in samples. The last batch of an epoch is padded with -1.
    shuffle_shards: shards in a window; reads of one epoch touch about that many files at a time.
    shuffle: False gives the plain order 0, 1, 2, ... in every epoch (evaluation).
    paired: slots of a global batch are assigned from both ends, so mirrored slots (0 and batch_size - 1, ...) are in
    the same micro-batch if its size is even. Mixup blends them.
    """

    shard_sizes: Sequence[int] | Ids
    seed: int
    batch_size: int
    shuffle_shards: int
    shuffle: bool = True
    paired: bool = False

    def __post_init__(self) -> None:
        sizes = np.asarray(self.shard_sizes, dtype=np.int64)
        if sizes.ndim != 1 or (sizes < 0).any() or sizes.sum() == 0:
            raise ValueError("a sample plan needs at least one sample, and no shard may have a negative size")
        if self.batch_size < 1 or self.shuffle_shards < 1:
            raise ValueError("batch_size and shuffle_shards must be at least 1")
        object.__setattr__(self, "shard_sizes", sizes)

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return int(np.sum(self.shard_sizes))

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one epoch; the last one may be padded."""
        return -(-self.num_samples // self.batch_size)

    def accumulation(self, world_size: int, micro: int) -> int:
        """Micro-batches of each rank in one global batch."""
        return -(-self.batch_size // (world_size * micro))

    def ids_at(self, epoch: int, positions: Ids) -> Ids:
        """Sample ids, int64 of the shape of `positions`, at positions of an epoch; -1 outside the epoch."""
        positions = np.asarray(positions, dtype=np.int64)
        inside = (positions >= 0) & (positions < self.num_samples)
        ids = np.where(inside, positions, -1)
        if not self.shuffle or not inside.any():
            return ids
        starts = _epoch_windows(self, epoch)[1]
        window_of = np.searchsorted(starts, ids, side="right") - 1
        for window in np.unique(window_of[inside]):
            here = inside & (window_of == window)
            ids[here] = epoch_window(self, epoch, int(window))[positions[here] - starts[window]]
        return ids

    def micro_batch_ids(
        self, epoch: int, step: int, rank: int, world_size: int, micro: int, accumulation_index: int
    ) -> Ids:
        """Sample ids of one micro-batch of one rank: int64 (micro,), -1 for slots beyond the batch or the epoch.

        Its number in the global batch is rank * accumulation + accumulation_index. So the union over ranks and
        accumulation is the same batch for any number of either, and the micro-batches of a rank are adjacent, as the
        sum of the exact engine requires.
        """
        item = step * self.accumulation(world_size, micro) + accumulation_index
        return self.ids_at(epoch, self.item_positions(item, rank, world_size, micro))

    def item_positions(self, item: int | Ids, rank: int | Ids, world_size: int, micro: int) -> Ids:
        """Positions in the epoch of a rank's micro-batch number `item`, counted from the start of the epoch:
        int64 (..., micro), -1 for slots beyond the batch. Arrays of items and ranks are broadcast."""
        accumulation = self.accumulation(world_size, micro)
        step, part = np.divmod(np.asarray(item, dtype=np.int64)[..., None], accumulation)
        number = np.asarray(rank, dtype=np.int64)[..., None] * accumulation + part
        slots = number * micro + np.arange(micro)
        inside = slots < self.batch_size
        if self.paired:
            pair, second = np.divmod(slots, 2)
            slots = np.where(second, self.batch_size - 1 - pair, pair)
        return np.where(inside, step * self.batch_size + slots, -1)


@lru_cache(maxsize=4)
def _epoch_windows(plan: SamplePlan, epoch: int) -> tuple[Ids, Ids]:
    """(shards in the epoch's order (n,), position at which each window starts (windows,))."""
    sizes = np.asarray(plan.shard_sizes)
    order = permuted(np.arange(len(sizes)), plan.seed, epoch, _SHARDS)
    ends = np.cumsum(sizes[order])
    firsts = np.arange(0, len(sizes), plan.shuffle_shards)
    return order, ends[firsts] - sizes[order][firsts]


@lru_cache(maxsize=4)
def epoch_window(plan: SamplePlan, epoch: int, window: int) -> Ids:
    """Sample ids (int64) of one window of the epoch, in order."""
    order, _ = _epoch_windows(plan, epoch)
    sizes = np.asarray(plan.shard_sizes)
    first_id = np.cumsum(sizes) - sizes
    shards = order[window * plan.shuffle_shards : (window + 1) * plan.shuffle_shards]
    ids = np.concatenate([first_id[shard] + np.arange(sizes[shard]) for shard in shards])
    return permuted(ids, plan.seed, epoch, _SAMPLES)
