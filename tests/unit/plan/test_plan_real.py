"""The planner's bytes beside those that a real step takes: the stage's own modules under its own engine, on a CPU.

Real allocations are torch.profiler's memory events; on a card, the caching allocator's peak.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from own_process import apart
from torch.profiler import ProfilerActivity, profile

from sfa_dist.parallel import runtime as parallel_runtime
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.plan.memory import predict
from sfa_dist.recipe.schema import Stage1, Stage2, StageBlock
from sfa_dist.tools.plan_probe import probe_stage, run_steps

ATTEMPTS = 4
MARK = 1_234_567  # Bytes of a tensor that is made right before the step that is measured: nothing else has this size.
SMALL = {"size": "tiny", "classes": 10, "image_size": 64, "temporal_depth": 2}
LARGE = {**SMALL, "width": 192, "depth": 6, "heads": 3, "mlp": 768, "image_size": 96}
SIZES = {"small": SMALL, "large": LARGE}
CACHES = {"cached": {"views": 1}, "partly live": {"views": 1, "live_fraction": 1.0}}


def make_stage(kind: str, size: str, **engine: Any) -> StageBlock:
    """A stage with two micro-batches of two clips a step on one rank."""
    micro_batches = engine.pop("micro_batches", 2)
    name = engine.pop("optimizer", "adamw")
    common = {
        "model": SIZES[size],
        "data": {"train": ["x"]},
        "batch": {"size": 2 * micro_batches, "micro": 2},
        "optimizer": {"name": name, "lr": 0.01},
        "schedule": {"epochs": 1},
        "engine": engine,
    }
    if kind in ("e2e", "checkpointed"):
        stage = Stage1.model_validate({**common, "frames": 8})
        return stage.model_copy(update={"activation": "checkpoint"}) if kind == "checkpointed" else stage
    adapter = {"placement": "tokens"} if kind == "tokens" else {}
    own = {"frames": 16, "chunk_frames": 4, "adapter": adapter, "overlap": "off", "cache": CACHES.get(kind)}
    return Stage2.model_validate({**common, **own})


@contextmanager
def alone() -> Iterator[Runtime]:
    """This process alone, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it.
        yield parallel_runtime.start({})
        parallel_runtime.stop()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with alone() as runtime:
        yield runtime


def real_peak(stage: StageBlock, runtime: Runtime) -> int:
    """Bytes that are allocated at the peak of the second step. Without oneDNN: its bf16 products take workspaces of the
    size of a weight, which are a CPU's alone."""
    gc.collect()  # What an earlier test has left must not die while this one is measured.

    def mark(step: int) -> None:
        if step == 1:
            gc.collect()  # What building the engine has left in cycles.
            torch.empty(MARK, dtype=torch.uint8)

    without_workspaces = torch.backends.mkldnn.flags(enabled=False)
    with without_workspaces, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run_steps(stage, runtime, 2, mark)
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    # Of two events at the same nanosecond, what was freed came first: its memory is what the other took.
    changes = [event.nbytes() for event in sorted(events, key=lambda event: (event.start_ns(), event.nbytes()))]
    live = list(accumulate(changes))
    return max(live[changes.index(MARK) + 1 :])


def real_peak_alone(stage: StageBlock) -> int:
    """`real_peak` of a process that did nothing else."""
    with alone() as runtime:
        return real_peak(stage, runtime)


# Peaks in forward, in backward, while gradients are reduced, and in the step.
CASES = [
    ("checkpointed", {"zero": 2, "precision": "bf16"}),
    ("e2e", {"zero": 0, "precision": "fp32"}),
    ("e2e", {"zero": 0, "precision": "bf16"}),
    ("e2e", {"zero": 2, "precision": "bf16"}),
    ("e2e", {"zero": 2, "precision": "fp32", "micro_batches": 1, "optimizer": "sgd"}),
    ("e2e", {"reduction": "tree", "precision": "fp32"}),
    ("pooled", {"zero": 2, "precision": "bf16"}),
    ("pooled", {"zero": 0, "precision": "fp32", "micro_batches": 1, "optimizer": "sgd"}),
    ("cached", {"zero": 2, "precision": "bf16"}),
    ("partly live", {"zero": 2, "precision": "bf16"}),
    ("tokens", {"zero": 2, "precision": "bf16"}),
    ("tokens", {"zero": 1, "precision": "fp32", "micro_batches": 1}),
]


def compare(stage: StageBlock, label: str, measure: Callable[[StageBlock], int]) -> None:
    """Fails where plan and reality differ by 2 % or more; shows both.

    What gloo's own thread frees, the profiler does not see, and counts it as live from then on: of several measurements
    the smallest is the nearest.
    """
    plan = predict(stage)
    real = measure(stage)
    for _ in range(ATTEMPTS - 1):
        if real <= 1.02 * plan.peak_bytes:
            break
        real = min(real, measure(stage))
    mib = f"real {real / 2**20:.2f} MiB, planned {plan.peak_bytes / 2**20:.2f} MiB"
    print(f"{label}: {mib} ({plan.peak_bytes / real - 1:+.2%})")
    assert plan.peak_bytes == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "engine"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_the_plan_is_what_a_step_allocates(kind: str, engine: dict[str, Any], size: str, runtime: Runtime) -> None:
    compare(make_stage(kind, size, **engine), f"{kind} {size} {engine}", lambda stage: real_peak(stage, runtime))


def test_zero_1_in_bf16_keeps_whole_gradients() -> None:
    """The gradients of this engine outlive it, and would die while the next one of the same process is measured."""
    compare(make_stage("e2e", "large", zero=1, precision="bf16"), "e2e large zero 1", partial(apart, real_peak_alone))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["e2e", "pooled", "tokens"])
def test_the_plan_is_what_a_card_allocates(kind: str, runtime: Runtime) -> None:
    """Kernels' workspaces are in it, which the reserve is for, so it is not as close as on a CPU."""
    probe = probe_stage(make_stage(kind, "large", zero=2, precision="bf16"), runtime)
    assert probe.planned_bytes == pytest.approx(probe.peak_bytes, rel=0.1)
    assert probe.micro_seconds > 0
