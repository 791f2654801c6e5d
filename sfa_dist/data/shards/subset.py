"""Subsets and relabelled copies of an index, for checks of a data set before training."""

from __future__ import annotations

import dataclasses

import numpy as np

from sfa_dist.data.shards.index_columns import Int64
from sfa_dist.data.shards.shard_index import SampleIndex


def subset(index: SampleIndex, samples: Int64) -> SampleIndex:
    """The index of these samples, in the order of the shards."""
    kept = np.sort(samples)
    numbers = {old: new for new, old in enumerate(kept.tolist())}
    return dataclasses.replace(
        index,
        **{name: getattr(index, name)[kept] for name in ("shard", "offset", "size", "crc32", "label")},
        keys=[index.keys[sample] for sample in kept.tolist()],
        suffix=[index.suffix[sample] for sample in kept.tolist()],
        errors={numbers[old]: why for old, why in index.errors.items() if old in numbers},
    )


def balanced(labels: Int64, most: int, rng: np.random.Generator) -> Int64:
    """At most `most` of the samples with a label, int64 (n,), drawn in turn from each class while it has any left.

    labels: int64 (samples,), -1 for none.
    """
    queues = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels[labels >= 0])]
    turns = np.concatenate([np.arange(len(queue)) for queue in queues]) if queues else np.empty(0, dtype=np.int64)
    drawn = np.concatenate(queues) if queues else np.empty(0, dtype=np.int64)
    return drawn[np.argsort(turns, kind="stable")][:most].astype(np.int64)


def relabelled(index: SampleIndex, rng: np.random.Generator) -> SampleIndex:
    """The same samples with their labels permuted, so that labels say nothing about the clips."""
    return dataclasses.replace(index, label=index.label[rng.permutation(len(index))])


def same_clips(one: SampleIndex, other: SampleIndex) -> int:
    """The number of clips of `one` with the size and crc32 of a clip of `other`."""
    known = set(zip(other.size.tolist(), other.crc32.tolist(), strict=True))
    return sum(each in known for each in zip(one.size.tolist(), one.crc32.tolist(), strict=True))
