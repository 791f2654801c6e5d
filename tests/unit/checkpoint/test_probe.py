"""The probe: the same clip each time, a loss that tells when something computes otherwise, and how far it may."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfa_dist.checkpoint import probe
from sfa_dist.checkpoint.probe import TOLERANCE, Probe, check_probe, place_changes, platform_of, probe_batch
from sfa_dist.errors import CheckpointError
from sfa_dist.models.assembly import freeze
from sfa_dist.models.frozen import FrozenTrunk
from sfa_dist.models.vivit import Tail, Trunk, build
from sfa_dist.recipe.schema import Stage2

MODEL = {"size": "tiny", "classes": 5, "temporal_depth": 1, "width": 24, "heads": 2, "mlp": 32, "depth": 1, "patch": 8}
CPU = torch.device("cpu")


@pytest.fixture
def stage() -> Stage2:
    block = {"frames": 4, "model": {**MODEL, "image_size": 16}, "data": {}, "optimizer": {"lr": 0.1}}
    return Stage2.model_validate({**block, "schedule": {"epochs": 1}, "engine": {"precision": "fp32"}})


class PlainEngine:
    """As much of an engine as a probe needs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @torch.no_grad()
    def evaluate(self, inputs: Tensor) -> Tensor:
        return self.module.eval()(inputs)


@pytest.fixture
def engine(stage: Stage2) -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        tail = Tail(stage.model, stage.frames, stage.adapter)
    build(tail)
    nn.init.normal_(tail.head.weight)
    return PlainEngine(tail)


@pytest.fixture
def frozen(stage: Stage2) -> FrozenTrunk:
    torch.manual_seed(1)
    with torch.device("meta"):
        trunk = Trunk(stage.model)
    build(trunk)
    return freeze(trunk, stage, pooled=True)


def test_the_clip_is_drawn_from_the_seed_alone(stage: Stage2) -> None:
    clips, labels = probe_batch(stage, 3)
    assert (clips.shape, clips.dtype, labels.shape) == ((1, 3, 4, 16, 16), torch.uint8, (1,))
    assert 0 <= int(labels) < 5
    assert clips.float().std() > 50
    torch.manual_seed(9)
    again, _ = probe_batch(stage, 3)
    assert torch.equal(clips, again)
    assert not torch.equal(clips, probe_batch(stage, 4)[0])


def test_the_loss_sees_the_trunk_and_the_tail(stage: Stage2, frozen: FrozenTrunk, engine: Any) -> None:
    loss = Probe.make(stage, 0, frozen, CPU).loss(engine)
    assert math.isfinite(loss)
    assert Probe.make(stage, 0, frozen, CPU).loss(engine) == loss
    with torch.no_grad():
        frozen.trunk.encoder.pos_embed[0, 0, 0] += 0.5
    assert Probe.make(stage, 0, frozen, CPU).loss(engine) != loss
    before = Probe.make(stage, 0, frozen, CPU)
    loss = before.loss(engine)
    with torch.no_grad():
        engine.module.head.bias[0] += 0.5
    assert before.loss(engine) != loss


def test_a_tail_without_its_trunk_is_probed_by_features(stage: Stage2, engine: Any) -> None:
    probe = Probe.make(stage, 0, None, CPU)
    assert probe.inputs.shape == (1, 2, 24)
    assert math.isfinite(probe.loss(engine))


PLACE = {"engine": {"precision": "fp32"}, "ranks": 2}


@pytest.mark.parametrize("precision", TOLERANCE)
def test_elsewhere_rounding_is_allowed_and_here_it_is_not(precision: str) -> None:
    elsewhere = {"engine": {"precision": precision}, "ranks": 3}
    recorded = {"loss": 2.0, "place": PLACE}
    check_probe(recorded, 2.0, PLACE, "c")
    check_probe(recorded, 2.0 + 1.9 * TOLERANCE[precision], elsewhere, "c")
    for loss, place in (
        (math.nextafter(2.0, 3.0), PLACE),
        (2.0 + 2.1 * TOLERANCE[precision], elsewhere),
        (math.nan, PLACE),
        (math.nan, elsewhere),
    ):
        with pytest.raises(CheckpointError, match=r"c computes something else .* was 2\.0 and is ") as caught:
            check_probe(recorded, loss, place, "c")
        assert repr(loss) in str(caught.value)


@pytest.mark.parametrize("updated", ["cudnn", "nccl", "driver", "cuda"])
def test_an_updated_driver_or_library_is_another_place(
    stage: Stage2, monkeypatch: pytest.MonkeyPatch, updated: str
) -> None:
    """It may choose other kernels on a GPU, so the loss may differ by rounding."""
    runtime: Any = SimpleNamespace(device=torch.device("cuda", 0), world_size=1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    versions = {"cuda": "13.0", "cudnn": "91200", "nccl": "2.27.5", "driver": "550.54"}
    monkeypatch.setattr(probe, "_cuda_versions", lambda: versions)
    before = platform_of(stage, runtime)
    check_probe({"place": before, "loss": 1.0}, 1.0, platform_of(stage, runtime), "a checkpoint")
    with pytest.raises(CheckpointError, match="bit for bit"):
        check_probe({"place": before, "loss": 1.0}, 1.0 + 1e-6, platform_of(stage, runtime), "a checkpoint")
    monkeypatch.setattr(probe, "_cuda_versions", lambda: {**versions, updated: "another"})
    check_probe({"place": before, "loss": 1.0}, 1.0 + 1e-6, platform_of(stage, runtime), "a checkpoint")


def test_versions_of_cuda_are_read_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert probe._cuda_versions()["nccl"] == "2.27.5"


def test_what_a_run_goes_on_with_is_told_by_key() -> None:
    recorded = {"engine": {"zero": 2, "precision": "fp32"}, "ranks": 2, "torch": "2.14"}
    now = {"engine": {"zero": 0, "precision": "fp32", "shard_ranks": None}, "ranks": 1, "torch": "2.14"}
    assert place_changes(recorded, recorded) == []
    assert place_changes(recorded, now) == [
        "ranks was 2 and is 1",
        "engine.zero was 2 and is 0",
        "engine.shard_ranks was not recorded and is None",
    ]
