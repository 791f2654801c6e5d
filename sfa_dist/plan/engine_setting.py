"""What an engine's memory depends on, apart from its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfa_dist.parallel.engines.optimizers import moments_of
from sfa_dist.parallel.engines.zero_config import limit_buckets
from sfa_dist.recipe.schema import StageBlock


@dataclass(frozen=True)
class Setting:
    """A stage on one of `world` ranks, with `accumulation` micro-batches a step."""

    stage: StageBlock
    world: int
    accumulation: int

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the state."""
        return self.stage.engine.shards(self.world)

    @property
    def bf16(self) -> bool:
        """Whether the engine computes in bf16."""
        return self.stage.engine.precision == "bf16"

    @property
    def offload(self) -> bool:
        """Whether masters and moments are kept in the host's memory."""
        return self.stage.engine.cpu_offload

    @property
    def wide(self) -> bool:
        """Whether bf16 gradients of several micro-batches are summed in fp32."""
        return self.bf16 and self.accumulation > 1

    @property
    def zero_block(self) -> Mapping[str, Any]:
        """The recipe's native `deepspeed.zero_optimization` keys."""
        return self.stage.deepspeed.get("zero_optimization", {})

    def bucket_elements(self, trainable: int) -> int:
        """Elements of the buffer in which DeepSpeed reduces gradients."""
        config = {"zero_optimization": dict(self.zero_block)}
        limit_buckets(config, trainable)
        return int(config["zero_optimization"]["reduce_bucket_size"])


def optimizer_bytes_per_rank(trainable: int, setting: Setting) -> int:
    """Bytes of the fp32 masters and moments that one rank owns, on its device or in the host's memory."""
    return 4 * -(-trainable // setting.shards) * (1 + len(moments_of(setting.stage.optimizer)))
