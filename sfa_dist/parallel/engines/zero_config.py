"""The DeepSpeed config of a stage: derived from the recipe, native keys passed through, contradictions refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from sfa_dist.errors import RecipeError
from sfa_dist.recipe.schema import StageBlock

BUCKET_ELEMENTS = 2**25  # 64 MiB in bf16; torch's DDP takes 25 MB.
# DeepSpeed's blocks that a key of the recipe replaces.
OWNED_BLOCKS = {"optimizer": "optimizer", "scheduler": "schedule", "fp16": "engine.precision"}


def derive_config(stage: StageBlock, world_size: int, accumulation: int) -> dict[str, Any]:
    """The config dictionary for `deepspeed.initialize`, with the recipe's `stage.deepspeed` merged in.

    Raises RecipeError if `stage.deepspeed` contradicts another key of the recipe.
    """
    bf16 = stage.engine.precision == "bf16"
    sharded = stage.engine.shards_optimizer
    derived: dict[str, Any] = {
        "train_batch_size": stage.batch.micro * accumulation * world_size,
        "train_micro_batch_size_per_gpu": stage.batch.micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": stage.optimizer.clip_norm,
        "zero_optimization": {"stage": stage.engine.zero},
        "bf16": {"enabled": bf16 and sharded},
        "torch_autocast": {"enabled": bf16 and not sharded, "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
    }
    if stage.engine.cpu_offload:
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        # DeepSpeed's CPU optimizer needs a compiler on the machine; torch's fused optimizers need none.
        derived["zero_force_ds_cpu_optimizer"] = False
    for block, key in OWNED_BLOCKS.items():
        if block in stage.deepspeed:
            raise RecipeError(f"deepspeed.{block} is not allowed in a recipe: use {key} instead")
    for path, native in _leaves(stage.deepspeed):
        known, value = _lookup(derived, path)
        if known and value != native:
            key = ".".join(("deepspeed", *path))
            raise RecipeError(f"{key} is {native!r}, but the recipe's own keys set it to {value!r}; remove {key}")
    # No progress lines, and no throughput timer, which waits for the GPU in each step: the trainer times its steps.
    defaults: dict[str, Any] = {"steps_per_print": 2**31 - 1, "timers": {"throughput": {"enabled": False}}}
    if bf16 and sharded and accumulation > 1:
        # Summed in bf16, the small gradients of many micro-batches would be lost.
        defaults["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(_merge(defaults, stage.deepspeed), derived)


def limit_buckets(config: dict[str, Any], trainable: int) -> None:
    """Gives DeepSpeed's reduction bucket a size that suits the model, unless the recipe sets one.

    By default DeepSpeed allocates 500 million elements on the device (1 GB in bf16), however small the model is.
    """
    config["zero_optimization"].setdefault("reduce_bucket_size", min(trainable, BUCKET_ELEMENTS))


def check_known_keys(config: Mapping[str, Any], parse: Callable[[dict[str, Any]], Any]) -> None:
    """Raises RecipeError for a key that DeepSpeed refuses or never reads, which it would ignore silently.

    `parse` is `deepspeed.DeepSpeedConfig`; it gets a dictionary that records which keys are read.
    """
    recorder = _Recorder(config)
    try:
        parse(recorder)
    except (AssertionError, ValueError, TypeError) as error:
        raise RecipeError(f"DeepSpeed refuses the block deepspeed: {' '.join(str(error).split())}") from error
    unknown = [key for key in config if key not in recorder.read]
    if unknown:
        near = get_close_matches(unknown[0], recorder.read, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"deepspeed.{unknown[0]} is not a key that DeepSpeed reads{hint}")


class _Recorder(dict[str, Any]):
    """A dictionary that records the keys that are read."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __copy__(self) -> _Recorder:
        return self


def _leaves(block: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _lookup(block: Any, path: tuple[str, ...]) -> tuple[bool, Any]:
    for key in path:
        if not isinstance(block, Mapping) or key not in block:
            return False, None
        block = block[key]
    return True, block


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        out[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out
