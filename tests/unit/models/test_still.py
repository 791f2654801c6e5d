"""What does not move is taken away: from pixels by `model.subtract`, from pooled vectors by `model.centre`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trunk_samples import CPU, MODEL, clips, trunk_of

from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.still import still_of, still_of_tubelets
from sfa_dist.models.vivit import Tail, ViViT, build, centred, normalise
from sfa_dist.parallel.engines.offload import HostLink

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.2, 0.1)


def frozen_of(subtract: str, chunk: int, offload: bool = False, pooled: bool = True) -> FrozenTrunk:
    trunk = trunk_of(MODEL.model_copy(update={"subtract": subtract}))
    frozen = FrozenTrunk(trunk, chunk, pooled, MEAN, STD, torch.float32)
    frozen.link = HostLink(CPU) if offload else None
    return frozen


def test_mean_and_median_on_known_pixels() -> None:
    """Each clip has its own; of 0, 0, 30, 90 the lower one in the middle is 0."""
    pixels = torch.tensor([[0, 30, 0, 90], [8, 8, 8, 8]], dtype=torch.uint8).view(2, 1, 4, 1, 1).expand(2, 3, 4, 1, 1)
    mean, median = still_of(pixels, "mean"), still_of(pixels, "median")
    assert mean is not None
    assert median is not None
    assert mean[:, 0].flatten().tolist() == [30.0, 8.0]
    assert median[:, 0].flatten().tolist() == [0.0, 8.0]
    assert still_of(pixels, "none") is None
    repeated = still_of_tubelets(mean, slice(1, 4), steps=2)
    assert repeated is not None
    assert repeated[:, 0].flatten().tolist() == [30.0, 8.0, 8.0]


def test_the_same_is_taken_before_and_after_normalisation() -> None:
    given = clips()
    still = still_of(given, "mean")
    plain = normalise(given, MEAN, STD, torch.float32)
    moving = normalise(given, MEAN, STD, torch.float32, still)
    torch.testing.assert_close(moving, plain - plain.mean(2, keepdim=True), atol=2e-5, rtol=0)


@pytest.mark.parametrize("subtract", ["mean", "median"])
def test_a_ground_that_stands_still_changes_nothing(subtract: str) -> None:
    """The same moving square over two grounds: a step's vector is that of the square alone."""
    frozen = frozen_of(subtract, 8)
    ground = torch.randint(0, 200, (2, 3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    given = ground.expand(2, 3, 8, 16, 16).clone()
    for frame in range(8):
        given[:, :, frame, 4:8, frame : frame + 4] += 50
    first, second = frozen(given)
    assert isinstance(first, Tensor)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    assert (first[1:] - first[:-1]).abs().max() > 1e-3
    raw, other = frozen_of("none", 8)(given)
    assert (raw - other).abs().max() > 0.1


@pytest.mark.parametrize("subtract", ["mean", "median"])
@pytest.mark.parametrize("pooled", [True, False])
def test_chunks_and_offload_change_nothing(subtract: str, pooled: bool) -> None:
    """A chunk of 6 frames cuts clips of 8, and holds steps of two clips."""
    whole = frozen_of(subtract, 1000, pooled=pooled)(clips())
    assert isinstance(whole, Tensor)
    torch.testing.assert_close(frozen_of(subtract, 6, pooled=pooled)(clips()), whole, atol=1e-5, rtol=0)
    offloaded: Any = frozen_of(subtract, 6, offload=True, pooled=pooled)(clips())
    offloaded = offloaded if pooled else offloaded.whole()
    torch.testing.assert_close(offloaded, whole, atol=1e-5, rtol=0)


def test_it_is_not_folded_and_tubelets_without_their_still_image_are_refused() -> None:
    frozen = frozen_of("mean", 8)
    assert frozen.folded is None
    assert frozen_of("none", 8).folded is not None
    tubelets = frozen.trunk.cut_tubelets(clips())
    with pytest.raises(TypeError, match="mean needs the still image of each tubelet's clip"):
        frozen.run_tubelets(tubelets)
    with pytest.raises(TypeError, match="none takes no still images"):
        frozen_of("none", 8).run_tubelets(tubelets, torch.zeros(8, 3, 16, 16))


def test_centred_vectors_have_no_mean_over_the_steps() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 4, 8)
    assert centred(features).mean(1).abs().max() < 1e-6
    same = centred((features + torch.randn(2, 1, 8)).bfloat16())
    assert same.dtype == torch.float32
    torch.testing.assert_close(same, centred(features), atol=0.05, rtol=0)


def test_a_tail_that_centres_does_not_see_what_all_steps_share() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        tail, whole = (kind(MODEL.model_copy(update={"centre": True}), 8) for kind in (Tail, ViViT))
    build(tail)
    torch.nn.init.normal_(tail.head.weight)
    features = torch.randn(2, 4, 96)
    torch.testing.assert_close(tail(features + torch.randn(2, 1, 96)), tail(features), atol=1e-4, rtol=0)
    assert whole.tail.centre
    assert not Tail(MODEL, 8).centre
