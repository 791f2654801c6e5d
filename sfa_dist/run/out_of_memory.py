"""Reports running out of memory: which rank, in which phase, what was in use, and which recipe keys need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sfa_dist.errors import LostRankError
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.watch.guard import Watch

ADVICE = (
    "lower batch.micro (accumulation makes up for it, and the result stays the same) or stage2.chunk_frames, take more "
    "ranks, a higher engine.zero or engine.cpu_offload; then run the command again to go on from the last checkpoint"
)
# Where memory runs out outside torch's allocator of GPU memory, a plain RuntimeError says so.
TEXTS = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",
    "CUDA error: out of memory",  # page-locked memory, CUDA graphs, a new context
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error is that of a device or a host without memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in TEXTS)


@contextmanager
def reported(runtime: Runtime, watch: Watch) -> Iterator[None]:
    """Turns running out of memory inside the block into a LostRankError; the watch informs the other ranks."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        phase, step = watch.position
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        who = f"rank {runtime.rank} on {runtime.host} is out of memory in phase {phase} at step {step}"
        raise LostRankError(f"{who} ({first_line}; {runtime.memory_summary()}); {ADVICE}") from error
