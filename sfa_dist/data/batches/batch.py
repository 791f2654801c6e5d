"""A micro-batch of one rank: what a loader makes, and what training and evaluation take.

Shape legend: B samples, V views of each, T frames, S x S pixels, F tubelet steps, D width of the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from torch import Tensor


@dataclass(eq=False)
class Mix:
    """What mixup blended in: the other clips' labels, like `Batch.labels`, and float32 (B,) shares of the own clip."""

    partners: Tensor
    shares: Tensor


@dataclass(eq=False)
class Batch:
    """B samples: either `clips`, or `features` from the cache, of which some may run live.

    Padding and bad samples have weight 0, label 0 and zeros in place of pixels or features.
    """

    labels: Tensor
    """int64 (B,), or (B, 2) for clips that have a noun and a verb."""
    weights: Tensor
    """float32 (B,): 1 for a sample that counts, 0 for padding and bad samples."""
    ids: Tensor
    """int64 (B,): numbers of the samples in the index, -1 for padding."""
    clips: Tensor | None = None
    """uint8 (B * V, 3, T, S, S), the views of a sample side by side; beside features (L, 3, T, S, S), for `live`."""
    features: Tensor | None = None
    """(B, F, D), as the trunk puts them out; zeros in the rows of `live`."""
    live: Tensor | None = None
    """int64 (L,): rows whose clips run through the trunk although the others are cached."""
    mix: Mix | None = None
    views: int = 1
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(shard/key, reason) of each sample that was not read."""
    looped: int = 0
    """How many clips are longer than their videos; not counted where features come from the cache."""

    def pin_memory(self) -> Batch:
        """The same in page-locked memory. DataLoader calls it."""
        pinned = {own.name: getattr(self, own.name) for own in fields(self)}
        pinned = {name: value.pin_memory() for name, value in pinned.items() if isinstance(value, Tensor)}
        mix = self.mix and Mix(self.mix.partners.pin_memory(), self.mix.shares.pin_memory())
        return replace(self, **pinned, mix=mix)
