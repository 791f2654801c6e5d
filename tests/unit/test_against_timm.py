"""Our spatial ViT beside timm's with the same weights: what benchmarks/against_timm.py times is the same function."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def against_timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as a script sees it: its folder is on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("against_timm")


def test_outputs_and_gradients_are_timms(against_timm: ModuleType) -> None:
    torch.manual_seed(0)
    models, side = against_timm.both("tiny", "fp32", torch.device("cpu"))
    images = torch.randn(3, 3, side, side)
    outputs, gradients = {}, {}
    for name, model in models.items():
        own = images.clone().requires_grad_()
        outputs[name] = model(own)
        outputs[name].square().sum().backward()
        gradients[name] = own.grad
    assert outputs["timm"].std() > 0.1
    torch.testing.assert_close(outputs["ours"], outputs["timm"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients["ours"], gradients["timm"], atol=1e-5, rtol=1e-4)
    ours, theirs = models["ours"].trunk, models["timm"]
    for block, other in zip(ours.encoder.blocks, theirs.blocks, strict=True):
        torch.testing.assert_close(block.attn.qkv.weight.grad, other.attn.qkv.weight.grad, atol=1e-5, rtol=1e-4)
    embed, other = ours.embed.weight.grad.squeeze(2), theirs.patch_embed.proj.weight.grad
    torch.testing.assert_close(embed, other, atol=1e-5, rtol=1e-4)


def test_it_prints_a_row_for_each_thing(
    against_timm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "told.json"
    arguments = ["--sizes", "tiny", "--rounds", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["against_timm.py", *arguments])
    threads = torch.get_num_threads()
    try:
        against_timm.main()
    finally:
        torch.set_num_threads(threads)
    told = json.loads(out.read_text())
    on_card = torch.cuda.is_available()
    precisions = ["bf16"] if on_card else ["fp32", "bf16"]
    assert [row[1:3] for row in told["rows"]] == [[p, what] for p in precisions for what in ("forward", "step")]
