"""Compiled blocks beside eager ones: the same loss and gradients, whatever becomes of the activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch._dynamo.utils import counters

from sfa_dist.errors import RecipeError
from sfa_dist.recipe.schema import Stage1, Stage2
from sfa_dist.stages.assemble import assemble_end_to_end, assemble_stage2
from sfa_dist.stages.trunk_setup import prepare_trainable

PLAIN: dict[str, Any] = {
    "frames": 4,
    "model": {"size": "tiny", "width": 32, "depth": 3, "heads": 2, "mlp": 64, "image_size": 16, "classes": 5},
    **{"data": {"train": ["x"]}, "optimizer": {"lr": 0.1}, "schedule": {"epochs": 1}},
}


def stage1(**keys: Any) -> Stage1:
    return Stage1.model_validate({**PLAIN, **keys})


def gradients(stage: Stage1) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Logits, gradients by name, and what was said."""
    torch.manual_seed(0)
    model = assemble_end_to_end(stage, None).trainable
    torch.nn.init.normal_(model.tail.head.weight)
    words = prepare_trainable(model, stage)
    clips = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    logits = model(clips)
    logits.square().sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "pooling"), [("keep", "cls"), ("checkpoint", "attention"), ("checkpoint_offload", "cls")]
)
def test_compiled_blocks_train_as_eager_ones(activation: str, pooling: str) -> None:
    """fp32: 1e-5 of the largest logit and of each parameter's largest gradient. An attention pool is a block too."""
    counters.clear()
    model = {**PLAIN["model"], "pooling": pooling}
    wanted, expected, _ = gradients(stage1(model=model))
    got, found, words = gradients(stage1(model=model, compile=True, activation=activation))
    assert words[0] == "trained blocks compiled"
    assert not counters["graph_break"], counters["graph_break"]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def test_zero_3_is_refused_end_to_end_and_told_in_stage_2() -> None:
    own = {"compile": True, "engine": {"zero": 3}}
    model = assemble_end_to_end(stage1(), None).trainable
    with pytest.raises(RecipeError, match=r"compile: ZeRO-3 .* use engine\.zero: 2 or engine\.name: fsdp"):
        prepare_trainable(model, stage1(**own))
    tail = Stage2.model_validate({**PLAIN, **own})
    [told] = prepare_trainable(assemble_stage2(tail, None, "").trainable, tail)
    assert told.startswith("trained blocks are not compiled: ZeRO-3")


def test_ways_that_do_not_go_with_it_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="activation: offload does not keep: use checkpoint_offload"):
        stage1(compile=True, activation="offload")
    with pytest.raises(ValidationError, match="fairscale's checkpoints run blocks uncompiled"):
        stage1(compile=True, activation="checkpoint", activation_backend="fairscale", engine={"zero": 2})
