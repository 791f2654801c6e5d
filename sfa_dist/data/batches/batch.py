"""A micro-batch of one rank: loaders yield it, training and evaluation take it.

Shape legend: B samples, V views of each, T frames, S x S pixels, F tubelet steps, D width of the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from torch import Tensor


@dataclass(eq=False)
class Mix:
    """What mixup blended into each clip of a batch."""

    partners: Tensor
    """Labels of the clips blended in, int64, shaped as `Batch.labels`."""
    shares: Tensor
    """float32 (B,): weight of the clip itself; 1 where nothing was blended in."""


@dataclass(eq=False)
class Batch:
    """B samples, as `clips` or as `features` from the cache; some samples beside cached ones may run live.

    Padding and bad samples have weight 0, label 0, and zeros for pixels or features.
    """

    labels: Tensor
    """int64 (B,), or (B, 2) for clips with a noun and a verb."""
    weights: Tensor
    """float32 (B,): 1 for a sample that counts, 0 for padding and bad samples."""
    ids: Tensor
    """int64 (B,): numbers of the samples in the index, -1 for padding."""
    clips: Tensor | None = None
    """uint8 (B * V, 3, T, S, S), a sample's views in neighbouring rows; with features, (L, 3, T, S, S) for `live`."""
    features: Tensor | None = None
    """(B, F, D) in the trunk's output dtype; zeros in the rows of `live`."""
    live: Tensor | None = None
    """int64 (L,): rows of `features` whose clips run through the trunk; all other rows come from the cache."""
    mix: Mix | None = None
    views: int = 1
    """V."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(shard/key, reason) of each sample that could not be read."""
    looped: int = 0
    """Number of clips longer than their videos; 0 where features come from the cache."""

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; DataLoader calls it."""
        pinned = {own.name: getattr(self, own.name) for own in fields(self)}
        pinned = {name: value.pin_memory() for name, value in pinned.items() if isinstance(value, Tensor)}
        mix = self.mix and Mix(self.mix.partners.pin_memory(), self.mix.shares.pin_memory())
        return replace(self, **pinned, mix=mix)
