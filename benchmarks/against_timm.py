"""Our spatial ViT against timm's VisionTransformer: the same weights, function and frames, taking turns.

    python benchmarks/against_timm.py                              # S and B, and L forward alone; on a GPU B, L and H
    python benchmarks/against_timm.py --sizes B --precisions bf16 --batch 8

`forward` is in inference mode; `step` is forward, backward and a fused AdamW, with weights in the precision throughout,
so that both do the same in plain PyTorch. timm's GELU is set to the tanh that ViViT has. The ratio is the median over
rounds of ours / timm's in the same round; how far the outputs are apart stands beside it. On a CPU one thread, and
time is that of the process.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import add_options, interleave, median_ratio, medians, report, script, spread
from torch import Tensor, nn
from trunk import SMALL

from sfa_dist.models.image_vit import trunk_state_from_timm
from sfa_dist.models.vivit import Dims, Trunk, dims_of
from sfa_dist.models.weights import load_exactly
from sfa_dist.recipe.blocks import ModelBlock

Work = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY_IMAGE = 32
COLUMNS = ("size", "precision", "what", "ours ms", "timm ms", "ours / timm", "spread", "outputs apart")


class OneFrame(nn.Module):
    """Our trunk with tubelets of one frame: images (R, 3, H, W) -> (R, D)."""

    def __init__(self, model: ModelBlock) -> None:
        super().__init__()
        self.trunk = Trunk(model)

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk.forward_tubelets(images.unsqueeze(2))


def timm_of(dims: Dims, image_size: int) -> nn.Module:
    """timm's model of these dimensions, without its head: images (R, 3, H, W) -> (R, D)."""
    return timm.models.VisionTransformer(
        img_size=image_size,
        patch_size=dims.patch,
        embed_dim=dims.width,
        depth=dims.depth,
        num_heads=dims.heads,
        mlp_ratio=dims.mlp / dims.width,
        num_classes=0,
        act_layer="gelu_tanh",
    )


def both(size: str, precision: str, device: torch.device) -> tuple[dict[str, nn.Module], int]:
    """The two models with the same weights, and the side of their images."""
    side = TINY_IMAGE if size == "tiny" else 224
    values: dict[str, Any] = {"classes": 2, "tubelet": 1, "image_size": side, **SMALL.get(size, {"size": size})}
    model = ModelBlock.model_validate(values)
    theirs, ours = timm_of(dims_of(model), side), OneFrame(model)
    load_exactly(ours.trunk, trunk_state_from_timm(theirs.state_dict(), ours.trunk, "timm"), "timm")
    return {name: each.to(device, DTYPES[precision]) for name, each in (("ours", ours), ("timm", theirs))}, side


def forward(model: nn.Module, images: Tensor) -> Work:
    """Forward alone."""

    def work() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return work


def step(model: nn.Module, images: Tensor) -> Work:
    """Forward, backward and the optimizer's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def work() -> None:
        model(images).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def measure(size: str, precision: str, arguments: argparse.Namespace, device: torch.device) -> list[list[Any]]:
    """The rows of one size in one precision."""
    models, side = both(size, precision, device)
    images = torch.randn(arguments.batch, 3, side, side, device=device, dtype=DTYPES[precision])
    ours, theirs = (forward(model.eval(), images)() for model in models.values())
    apart = float((ours.float() - theirs.float()).norm() / theirs.float().norm())  # type: ignore[attr-defined]
    rows = []
    ways = {"forward": forward} if size in arguments.forward_only else {"forward": forward, "step": step}
    for what, make in ways.items():
        seconds = interleave({name: make(model, images) for name, model in models.items()}, arguments.rounds)
        own, other = (1000 * medians(seconds)[name] for name in ("ours", "timm"))
        ratio = median_ratio(seconds["ours"], seconds["timm"])
        rows.append([size, precision, what, own, other, ratio, f"{spread(seconds['ours']):.0%}", f"{apart:.1e}"])
    return rows


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_card = torch.cuda.is_available()
    sizes = ["B", "L", "H"] if on_card else ["S", "B", "L"]
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "S", "B", "L", "H", "g"), default=sizes)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["bf16"] if on_card else list(DTYPES))
    parser.add_argument("--batch", type=int, default=64 if on_card else 4, help="images of a call")
    parser.add_argument("--forward-only", nargs="*", default=[] if on_card else ["L"], help="sizes without `step`")
    add_options(parser, rounds=15)
    arguments = parser.parse_args()
    device = torch.device("cuda" if on_card else "cpu")
    torch.manual_seed(0)
    if not on_card:
        torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for size in arguments.sizes:
        for precision in arguments.precisions:
            rows += measure(size, precision, arguments, device)
            gc.collect()
            if on_card:
                torch.cuda.empty_cache()
    title = f"our spatial ViT and timm {timm.__version__}'s, {arguments.batch} images, eager"
    report(arguments, f"{title}; medians of {arguments.rounds} rounds in turns", COLUMNS, rows)


if __name__ == "__main__":
    script(main)
