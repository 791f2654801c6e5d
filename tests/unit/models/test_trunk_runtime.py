"""The trunk's fast ways against its slow ones: folded, offloaded, compiled, chunked; and what each leaves in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from trunk_samples import CPU, MODEL, clips, frozen_of, tail_of, trunk_of

from sfa_dist.models.assembly import largest_chunk
from sfa_dist.models.assembly import trunk_of as built_trunk
from sfa_dist.models.footprint import OFFLOAD_FROM_BYTES, StoragePeak, feature_bytes, offloads
from sfa_dist.models.frozen import FrozenTrunk, copy_rows
from sfa_dist.models.vivit import Tail, Trunk, normalise
from sfa_dist.parallel.engines.offload import HostFeatures, HostLink, HostPool
from sfa_dist.recipe.blocks import AdapterBlock
from sfa_dist.recipe.schema import Stage2
from sfa_dist.stages.trunk_setup import chunk_that_fits, free_bytes

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# ------------------------------------------------------------------------------------------------ tubelets


@pytest.mark.parametrize("span", [slice(0, 1), slice(1, 7), slice(0, 8), slice(3, 5)])
def test_cut_tubelets_are_the_clips(span: slice) -> None:
    whole = clips()
    assert torch.equal(frozen_of(False).cut_tubelets(whole, span), trunk_of().cut_tubelets(whole)[span])


# ------------------------------------------------------------------------------------------------ folded = normalised


@pytest.mark.parametrize(("mean", "std"), [HALF, IMAGENET])
def test_folded_embedding_is_the_normalised_one(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """fp32: 2e-6 of the norm. bf16: no further from fp32 than normalising first is, to a tenth."""
    trunk, tubelets = trunk_of(), trunk_of().cut_tubelets(clips())
    exact = trunk.embed(normalise(tubelets, mean, std, torch.float32))

    def error(tokens: Tensor, wanted: Tensor) -> float:
        return ((tokens.float() - wanted).norm() / wanted.norm()).item()

    folded = FrozenTrunk(trunk, 8, mean=mean, std=std, dtype=torch.float32).folded
    assert folded is not None
    assert error(folded(tubelets), exact) < 2e-6
    half = trunk_of().bfloat16()
    rounded = half.float().embed(normalise(tubelets, mean, std, torch.float32))  # The same weights, exact arithmetic.
    half = half.bfloat16()
    slow = error(half.embed(normalise(tubelets, mean, std, torch.bfloat16)), rounded)
    folded = FrozenTrunk(half, 8, mean=mean, std=std).folded
    assert folded is not None
    assert error(folded(tubelets), rounded) < max(1.1 * slow, 5e-3)


def test_folding_leaves_no_trace_in_weights_and_hash() -> None:
    plain, folded = (FrozenTrunk(trunk_of(), 8, mean=IMAGENET[0], std=IMAGENET[1], fold=fold) for fold in (False, True))
    assert folded.sha256() == plain.sha256()
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in plain.parameters())


# ------------------------------------------------------------------------------------------------ offloaded = not


@pytest.mark.parametrize("chunk", [2, 6, 16, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_pooled_features_are_bit_equal(chunk: int, dtype: torch.dtype) -> None:
    on, off = (frozen_of(offload, chunk, pooled=True, dtype=dtype)(clips()) for offload in (True, False))
    assert torch.equal(on, off)
    assert not on.is_inference()


@pytest.mark.parametrize("chunk", [2, 6, 1000])
@pytest.mark.parametrize("recompute", ["function", "checkpoint"])
def test_offloaded_tokens_give_the_same_gradients(chunk: int, recompute: str) -> None:
    """fp32: forward 1e-5, gradients 1e-5 of the largest (another order of sums)."""
    wanted, got = tail_of(8), tail_of(8)
    assert got.adapter is not None
    got.adapter.recompute = recompute  # type: ignore[assignment]
    expected = wanted(frozen_of(False, chunk)(clips()))
    tokens = frozen_of(True, chunk)(clips())
    assert isinstance(tokens, HostFeatures)
    out = got(tokens)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    out.square().sum().backward()
    for (name, mine), theirs in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * scale, msg=name)


def test_gradients_of_many_chunks_are_added_in_fp32() -> None:
    """64 chunks in bf16: nearer to the fp32 gradient than by adding in bf16, as autograd does for `checkpoint`."""
    errors = {}
    exact = tail_of(128)
    exact(frozen_of(False, 8)(clips(128))).sum().backward()
    assert exact.adapter is not None
    wanted = exact.adapter.fc1.weight.grad
    assert wanted is not None
    for recompute in ("function", "checkpoint"):
        tail = tail_of(128).bfloat16()
        assert tail.adapter is not None
        tail.adapter.recompute = recompute  # type: ignore[assignment]
        tail(frozen_of(True, 4, dtype=torch.float32)(clips(128))).sum().backward()
        grad = tail.adapter.fc1.weight.grad
        assert grad is not None
        errors[recompute] = ((grad.float() - wanted).norm() / wanted.norm()).item()
    assert errors["function"] <= errors["checkpoint"]
    assert errors["function"] < 0.05


def test_a_tail_without_tokens_takes_no_chunks() -> None:
    tokens = frozen_of(True)(clips())
    with pytest.raises(TypeError, match="adapter on tokens"):
        tail_of(8, "pooled")(tokens)


def test_autocast_is_the_same_in_the_second_forward() -> None:
    grads = []
    for offload in (True, False):
        tail = tail_of(8)
        tokens = frozen_of(offload)(clips())
        with torch.autocast("cpu", torch.bfloat16):
            out = tail(tokens)
        out.sum().backward()
        assert tail.adapter is not None
        assert tail.adapter.fc1.weight.grad is not None
        grads.append(tail.adapter.fc1.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=2e-2 * grads[1].abs().max().item())


def test_host_buffers_are_used_again_and_never_shared() -> None:
    frozen = frozen_of(True)
    assert isinstance(frozen.link, HostLink)
    first = frozen(clips())
    held = frozen.link.pool.bytes
    kept = first.load(0).clone()
    second = frozen(255 - clips())  # While the first is alive: it gets a buffer of its own.
    assert torch.equal(first.load(0), kept)
    assert frozen.link.pool.bytes == 2 * held
    del first, second
    for _ in range(3):
        frozen(clips())
    frozen(clips(4))
    assert frozen.link.pool.bytes == 2 * held


def test_a_larger_request_takes_the_place_of_small_buffers() -> None:
    pool = HostPool(pinned=False)
    _, small = pool.take((4, 4), torch.float32)
    pool.give(small)
    large, _ = pool.take((8, 8), torch.bfloat16)
    assert large.shape == (8, 8)
    assert pool.bytes == 128


def test_chunks_come_in_either_order() -> None:
    tokens = frozen_of(True, chunk=2)(clips())
    whole = tokens.whole().flatten(0, 1)
    count = len(tokens.spans)
    for order in (range(count), range(count - 1, -1, -1), [2, 5, 2, 0, 7], range(count)):
        for index in order:
            assert torch.equal(tokens.load(index), whole[tokens.spans[index]])


# ------------------------------------------------------------------------------------------------ compiled = eager


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones() -> None:
    """fp32, 1e-5; the second call has another number of tubelets."""
    eager, compiled = frozen_of(False, 8, pooled=True), frozen_of(True, 8, pooled=True)
    compiled.compile_blocks()
    for frames in (8, 6):
        torch.testing.assert_close(compiled(clips(frames)), eager(clips(frames)), rtol=1e-5, atol=1e-5)
    assert compiled.sha256() == eager.sha256()
    assert compiled.state_dict().keys() == eager.state_dict().keys()


# ------------------------------------------------------------------------------------------------ chunks that fit


def test_the_largest_chunk_within_a_quarter_of_free_memory() -> None:
    def need(tubelets: int) -> int:
        return 10 + 100 * tubelets

    assert chunk_that_fits(need, free=10**9, tubelet=2, most=64) == 64
    assert chunk_that_fits(need, free=4 * 810, tubelet=2, most=64) == 16
    assert chunk_that_fits(need, free=4 * 809, tubelet=2, most=64) == 8
    assert chunk_that_fits(need, free=0, tubelet=2, most=64) == 2
    assert chunk_that_fits(need, free=10**9, tubelet=4, most=64) == 64


@pytest.mark.parametrize(("size", "gpu", "cpu"), [("B", 128, 16), ("L", 128, 16), ("H", 64, 8), ("g", 64, 8)])
def test_the_largest_chunk_is_one_of_tokens(size: str, gpu: int, cpu: int) -> None:
    block = stage(model={"size": size, "classes": 5})
    with torch.device("meta"):
        trunk = built_trunk(block)
    assert (largest_chunk(trunk, "cuda"), largest_chunk(trunk, "cpu")) == (gpu, cpu)


def test_free_memory_of_this_machine() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50


# ------------------------------------------------------------------------------------------------ offload: auto


def stage(**keys: object) -> Stage2:
    plain = {
        "frames": 128,
        "model": {"size": "L", "classes": 5},
        "data": {"train": ["x"]},
        "optimizer": {"lr": 0.1},
        "schedule": {"epochs": 1},
        **keys,
    }
    return Stage2.model_validate(plain)


def test_auto_offloads_tokens_that_would_take_much() -> None:
    tokens = {"placement": "tokens"}
    assert not offloads(stage())
    assert not offloads(stage(adapter=tokens))  # 26 MB of tokens and 19 MB of pixels.
    assert offloads(stage(adapter=tokens, batch={"micro": 8}))
    assert offloads(stage(offload="on"))
    assert not offloads(stage(offload="off", adapter=tokens, batch={"micro": 8}))
    assert feature_bytes(stage(adapter=tokens)) == 64 * 197 * 1024 * 2
    assert OFFLOAD_FROM_BYTES == 2**28


# ------------------------------------------------------------------------------------------------ frames are free


WIDE = MODEL.model_copy(update={"image_size": 32})  # 17 tokens: 1,632 bytes a frame in bf16.
FEW, MANY = 8, 256
TOKENS_A_FRAME, VECTOR_A_FRAME = 17 * 96 * 2 // 2, 96 * 4 // 2


def device_peak(frames: int, placement: str, offload: bool) -> int:
    """Bytes beyond weights, clip and host buffers that a stage-2 forward and backward takes at its peak, less those of
    the temporal encoder, which sees all frames and keeps what they need."""
    frozen = FrozenTrunk(trunk_of(WIDE), 8, placement == "pooled")
    frozen.link = HostLink(CPU) if offload else None
    tail = tail_of(frames, placement)
    given = clips(frames, batch=1, size=32)

    def step() -> None:
        tail(frozen(given)).sum().backward()

    step()  # Makes the host buffers and the gradients.
    with StoragePeak() as storages:
        step()
    return storages.peak - temporal_peak(frames)


def temporal_peak(frames: int) -> int:
    """What the tail takes at its peak when the vectors are there: adapter, temporal encoder and head."""
    tail = tail_of(frames, "pooled")
    assert tail.temporal is not None
    vectors = torch.randn(1, frames // 2, 96, requires_grad=True)
    tail.head(tail.temporal.pool(tail.temporal(vectors))).sum().backward()
    with StoragePeak() as storages:
        tail.head(tail.temporal.pool(tail.temporal(vectors))).sum().backward()
    return storages.peak


class TestFramesAreFree:
    """Growth of the device's peak from 8 to 256 frames, in bytes a frame, against the 1,632 of a frame's tokens."""

    def growth(self, placement: str, offload: bool) -> float:
        return (device_peak(MANY, placement, offload) - device_peak(FEW, placement, offload)) / (MANY - FEW)

    def test_offloaded_tokens_are_flat(self) -> None:
        """Nothing grows: the peak is the same to the byte, beyond what the temporal encoder needs."""
        assert abs(self.growth("tokens", True)) < 1

    def test_tokens_on_the_device_do_grow(self) -> None:
        """The same measure finds growth where there is some: the tokens, and what the adapter keeps of them in fp32."""
        assert self.growth("tokens", False) > 3 * TOKENS_A_FRAME

    @pytest.mark.parametrize("offload", [True, False])
    def test_pooled_frames_take_their_vectors(self, offload: bool) -> None:
        """At most three vectors in fp32; the clip's own pixels, 3 x 32 x 32 bytes a frame, are the input and not
        counted. At the size of ViViT-H that is 7.5 KiB a frame and 147 KiB of pixels."""
        assert self.growth("pooled", offload) <= 3 * VECTOR_A_FRAME


# ------------------------------------------------------------------------------------------------ fake tensors


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_the_step_can_be_traced_on_fake_tensors(fake: FakeTensorMode, offload: bool, pooled: bool) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        trunk = Trunk(MODEL)
    finally:
        torch.set_default_dtype(before)
    frozen = FrozenTrunk(trunk, 4, pooled)
    frozen.link = HostLink(CPU) if offload else None
    tail = Tail(MODEL, 8, AdapterBlock(placement="pooled" if pooled else "tokens"))
    out = tail(frozen(torch.empty(2, 3, 8, 16, 16, dtype=torch.uint8)))
    out.sum().backward()
    assert out.shape == (2, 5)
    assert all(p.grad is not None for p in tail.parameters())


def test_storage_peak_counts_what_is_alive() -> None:
    work: Callable[[], Tensor] = lambda: torch.ones(1000) + torch.ones(1000)  # noqa: E731
    with StoragePeak() as storages:
        kept = work()
        assert storages.now == 4000
        kept.add_(1).view(10, 100)
        del kept
    assert (storages.now, storages.peak) == (0, 12000)


class Copies(TorchDispatchMode):
    """Counts copies."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function is torch.ops.aten.copy_.default
        return function(*arguments, **(keywords or {}))


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_rows_are_copied_by_three_copies_at_most(batch: int, steps: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, batch * steps - 1))
    stop = data.draw(st.integers(start + 1, batch * steps))
    rows = torch.arange(batch * steps * 6).view(batch, 2, steps, 3).transpose(1, 2)
    out = torch.zeros(stop - start, 2, 3, dtype=torch.int64)
    with Copies() as copies:
        copy_rows(rows, slice(start, stop), out)
    assert torch.equal(out, rows.flatten(0, 1)[start:stop])
    assert copies.count <= 3


def test_copy_tubelets_fills_a_given_buffer() -> None:
    out = torch.zeros(3, 3, 2, 16, 16, dtype=torch.uint8)
    frozen_of(False).copy_tubelets(clips(), slice(2, 5), out)
    assert torch.equal(out, trunk_of().cut_tubelets(clips())[2:5])
