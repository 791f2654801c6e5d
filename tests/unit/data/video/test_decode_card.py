"""`data.decode_device: cuda`: what is refused, that batches come a step ahead, and that a card's frames are the CPU's.

Most of it runs without a card: the device is a parameter, and fake tensors tell where an operation would run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import encode, eval_transform, video_bytes, write_shard
from torch._subclasses.fake_tensor import FakeTensorMode

from sfa_dist.data.batches.augment import train_transform
from sfa_dist.data.batches.feed import FeedSettings, feed
from sfa_dist.data.batches.planned import ClipSettings, LoaderSettings
from sfa_dist.data.batches.rand_augment import OPERATIONS
from sfa_dist.data.batches.stream import EvalViews, TrainViews, cut_clips, eval_loader
from sfa_dist.data.shards.shard_index import load_index
from sfa_dist.data.video.decode import NO_OTHER_LIMITS, choose_decoder, decoder_of
from sfa_dist.data.video.decode_pyav import PyAVVideo
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock, RandAugmentBlock
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.run.record import refuse_other_inputs, stage_inputs
from sfa_dist.training.loader_share import loader_line

torchcodec = pytest.importorskip("sfa_dist.data.video.decode_torchcodec", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[4]
B_32F = ROOT / "recipes" / "b_32f.yaml"
ON_CARD = ("data.decode_device=cuda", "data.workers=0")
has_card = torch.cuda.is_available()
META = torch.device("meta")  # Stands for a device that is not the CPU.


def smooth(frames: int = 24, height: int = 240, width: int = 320) -> bytes:
    """A moving picture in colour without edges, where ways to make RGB of halved chroma differ least."""
    y, x = np.mgrid[0:height, 0:width] / 60

    def frame(number: int) -> np.ndarray:
        waves = [np.sin(x + number / 5 + phase) + np.cos(y - number / 7 + phase) for phase in (0, 2, 4)]
        return (128 + 45 * np.stack(waves, axis=-1)).astype(np.uint8)

    return encode([frame(number) for number in range(frames)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.decode_device=cuda", "data.workers=2"], "cannot share its rank's GPU: set data.workers to 0"),
        ([*ON_CARD, "data.decoder=pyav"], "only torchcodec decodes on a GPU"),
        (["data.decode_device=gpu"], "'cpu' or 'cuda'"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match="decode_device") as refused:
        load_recipe(B_32F, overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(has_card, reason="there is a GPU")
def test_without_a_card_it_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"needs a GPU, and there is none here: set data\.decode_device to cpu"):
        decoder_of(DataBlock(workers=0, decode_device="cuda"))
    with pytest.raises(RecipeError, match=r"cannot decode on cuda:0 \(.+\)\. Install a torchcodec that") as refused:
        torchcodec.require_card_decodes(torch.device("cuda", 0))
    assert "\n" not in str(refused.value)


def test_a_missing_driver_library_is_not_made_up_for_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchcodec would decode all on the CPU, with one thread and without a word."""
    torchcodec.require_card_decodes(torch.device("cpu"))  # What it opens, opens.
    status = "[NVDEC] Fallback status: Falling back due to: NVcuvid unavailable"
    monkeypatch.setattr(torchcodec, "_opened", lambda data, device: SimpleNamespace(cpu_fallback=status))
    with pytest.raises(RecipeError, match=r"libnvcuvid\.so\.1 is missing"):
        torchcodec.require_card_decodes(torch.device("cuda", 0))


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "CUDA out of memory."])
def test_what_is_wrong_with_the_card_is_no_bad_sample(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def refuse(*arguments: object) -> Any:
        raise RuntimeError(words)

    monkeypatch.setattr(torchcodec, "_opened", refuse)
    with pytest.raises(RuntimeError, match=words):
        torchcodec.TorchcodecVideo(video_bytes(), NO_OTHER_LIMITS, META)
    video = torchcodec.TorchcodecVideo(video_bytes(), NO_OTHER_LIMITS)  # On the CPU PyAV reads in its place.
    assert torch.equal(video.frames_at([0]), PyAVVideo(video_bytes(), NO_OTHER_LIMITS).frames_at([0]))


def test_runs_and_caches_tell_the_card_from_the_cpu() -> None:
    assert torchcodec.version(META) == f"{torchcodec.version()}, on the card"
    recipes = [load_recipe(B_32F, overrides).recipe for overrides in (["data.workers=0"], ON_CARD)]
    cpu, card = (stage_inputs(recipe, recipe.stage1, "", "") for recipe in recipes if recipe.stage1)
    assert "data.decode_device" not in cpu  # As in run directories of before there was a choice.
    assert card == {**cpu, "data.decode_device": "cuda"}
    assert "augment.resize" not in cpu  # The same.
    refuse_other_inputs("stage1", {**cpu, "data.limits.decoded_mib": 4096}, cpu)  # Recorded by older runs.


def test_more_loader_processes_are_not_advised() -> None:
    stage = load_recipe(B_32F, ON_CARD).recipe.stage1
    assert stage is not None
    line = loader_line(0.5, stage, cores=4) or ""
    assert "decode in loader processes (data.decode_device: cpu, data.workers: 4)" in line
    assert "raise data.workers" not in line


def test_all_augmentation_stays_where_the_frames_are() -> None:
    """Fake tensors: an operation that mixes devices raises."""
    draws = [np.random.default_rng(seed) for seed in range(4)]
    color = AugmentBlock(color=1.0, gray=1.0)
    with FakeTensorMode(allow_non_fake_inputs=False):
        clip = torch.empty((9, 40, 60, 3), dtype=torch.uint8, device="cuda")
        out = [train_transform(clip, 32, 24, color, draws[0]), eval_transform(clip, 32, 24, 1, 3)]
        plain = torch.empty((3, 9, 10, 40), dtype=torch.uint8, device="cuda")
        # How long a histogram is depends on the pixels, which a fake has none of.
        out += [work(plain, 15, draws[1]) for name, work in OPERATIONS.items() if name != "equalize"]
    assert {each.device.type for each in out} == {"cuda"}
    assert {each.dtype for each in out} == {torch.uint8}


def test_a_feed_without_workers_can_be_a_batch_ahead(tmp_path: Path) -> None:
    """Else a card would decode only while training waits. The batches are the same."""
    shard = write_shard(tmp_path / "a.tar", [(f"clip{n:04d}", video_bytes(6 + n), n % 3) for n in range(8)])
    index, data = load_index([shard]), DataBlock(resize=28, stride=1, workers=0)
    settings = LoaderSettings(data, BatchBlock(size=2, micro=2), AugmentBlock(), frames=4, crop=24)
    plain, ahead = (eval_loader(index, settings) for _ in range(2))
    made = [threading.Event() for _ in range(4)]
    dataset: Any = ahead.dataset
    assert dataset.ahead == 0  # On a CPU there are workers for it.
    dataset.ahead = 1
    make: Callable[[Any], Any] = dataset._batch

    def told(ids: Any) -> Any:
        batch = make(ids)
        made[int(ids[0]) // 2].set()
        return batch

    dataset._batch = told
    batches = []
    for number, batch in enumerate(feed(ahead, FeedSettings("rank 0", None))):
        batches.append(batch)
        assert number == 3 or made[number + 1].wait(60)  # Nobody has asked for it yet.
    for one, other in zip(batches, plain, strict=True):
        assert torch.equal(one.clips, other.clips)
        assert torch.equal(one.ids, other.ids)


@pytest.mark.gpu
@pytest.mark.skipif(not has_card, reason="no GPU")
def test_frames_of_a_card_are_those_of_the_cpu() -> None:
    """The same frames; RGB within 4 levels in 99 % of the values, and within 1.5 on average."""
    card, cpu = decoder_of(DataBlock(workers=0, decode_device="cuda")), choose_decoder("torchcodec")
    numbers = np.array([0, 7, 3, 3, 23, 12])
    ours, expected = (decoder.open(smooth()).frames_at(numbers) for decoder in (card, cpu))
    torch.cuda.synchronize()
    assert (ours.device.type, ours.shape, ours.dtype) == ("cuda", expected.shape, torch.uint8)
    _assert_near(ours.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not has_card, reason="no GPU")
@pytest.mark.parametrize("rand", [False, True])
def test_clips_of_a_card_are_those_of_the_cpu(rand: bool) -> None:
    data = DataBlock(resize=224, workers=0, decode_device="cuda", fps="stored")
    card, cpu = decoder_of(data), choose_decoder("torchcodec")
    settings = ClipSettings(data, frames=8, crop=192, seed=3)
    plain = AugmentBlock(color=0.0, gray=0.0)
    augment = AugmentBlock(color=0.0, gray=0.0, rand_augment=RandAugmentBlock()) if rand else plain
    for views in (TrainViews(settings, augment), EvalViews(settings, 2, 3)):
        ours, expected = (cut_clips(smooth(), decoder, views, 1, 2) for decoder in (card, cpu))
        assert ours.device.type == "cpu"
        assert ours.shape == expected.shape
        if not (rand and isinstance(views, TrainViews)):  # Its operations enlarge what was small.
            _assert_near(ours, expected)


def _assert_near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    gap = (ours.int() - expected.int()).abs().float()
    assert float(gap.mean()) < 1.5
    assert float((gap <= 4).float().mean()) > 0.99
