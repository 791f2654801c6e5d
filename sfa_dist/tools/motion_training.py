"""Trains a small trunk on generated clips: its pooled vector learns where objects are and how they move.

A linear head regresses the labels of 2-frame clips, and is discarded afterwards. The learned positions of the grid
start at N(0, 1): with smaller ones the pooled vector does not learn places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_dist.data.motion.clips import CELLS, MotionLabels
from sfa_dist.data.motion.stream import MotionStream, made_clips
from sfa_dist.models.vivit import Trunk, build, normalise
from sfa_dist.recipe.blocks import ModelBlock

FRAMES = 2  # One tubelet.
HELD_OUT = range(2**40, 2**40 + 1024)  # Indices that no training reaches.
BATCH, WARMUP, LAST = 32, 50, 0.02
LEARNING_RATE, CLIP_NORM = 6e-4, 1.0
POSITIONS_STD = 1.0
PIXELS = ([0.45, 0.45, 0.45], [0.25, 0.25, 0.25])  # Mean and standard deviation of common videos.
TOLD_EVERY = 50  # Steps.
# For each group of labels: its scale, by which it is divided, and its weight in the loss.
TARGETS = {
    "position": (0.25, 1.0),
    "displacement": (0.05, 1.0),
    "ground": (0.03, 0.5),
    "cover": (0.2, 0.5),
    "flow": (0.01, 0.5),
}
WIDTHS = {"position": 2, "displacement": 2, "ground": 2, "cover": CELLS**2, "flow": 2 * CELLS**2}


def target_groups(labels: MotionLabels) -> dict[str, Tensor]:
    """The regressed labels of 2-frame clips, each (B, n), scaled to about 1."""
    raw = {
        "position": labels.centres[:, -1] - 0.5,
        "displacement": labels.steps[:, -1],
        "ground": labels.pan[:, -1],
        "cover": labels.cover[:, -1].flatten(1),
        "flow": labels.flow[:, -1].flatten(1),
    }
    return {name: value / TARGETS[name][0] for name, value in raw.items()}


def learning_rate(step: int, steps: int) -> float:
    """The learning rate at `step`: linear warm-up, then linear decay to LAST times the highest rate."""
    down = 1 - (1 - LAST) * max(0, step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * min((step + 1) / WARMUP, down)


class Regression(nn.Module):
    """A trunk, and a linear head on its pooled vector that predicts the target groups."""

    def __init__(self, model: ModelBlock) -> None:
        super().__init__()
        with torch.device("meta"):
            self.trunk = Trunk(model)
        build(self.trunk)
        nn.init.normal_(self.trunk.encoder.pos_embed, std=POSITIONS_STD)
        self.head = nn.Linear(self.trunk.width, sum(WIDTHS.values()))

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """uint8 clips (B, 3, 2, H, W) -> each group of targets, (B, n), in fp32."""
        tubelets = normalise(self.trunk.cut_tubelets(clips), *PIXELS, dtype=torch.float32)
        found = self.head(self.trunk.forward_tubelets(tubelets))
        return dict(zip(WIDTHS, found.split(list(WIDTHS.values()), dim=1), strict=True))


def train_prior(model: ModelBlock, seed: int, steps: int, tell: Callable[[str], None]) -> Regression:
    """Trains from random weights; `tell` gets the progress. Seed, machine and number of threads fix the result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        regression = Regression(model)
    optimizer = torch.optim.AdamW(regression.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    batches = MotionStream(seed, BATCH, FRAMES, model.image_size)
    for step, (clips, labels) in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = _loss(regression(clips), target_groups(labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(regression.parameters(), CLIP_NORM)
        optimizer.step()
        if (step + 1) % TOLD_EVERY == 0:
            tell(f"step {step + 1} of {steps}, loss {loss.item():.3f}")
    return regression.eval()


def _loss(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    parts = [TARGETS[name][1] * F.smooth_l1_loss(found[name], wanted[name]) for name in TARGETS]
    return torch.stack(parts).sum()


@torch.no_grad()
def held_out_r2(regression: Regression, seed: int, size: int, clips: range = HELD_OUT) -> dict[str, float]:
    """R2 of each group on clips that training has not seen: the share of its variance that the head explains."""
    pixels, labels = made_clips(seed, clips, FRAMES, size)
    found, wanted = regression(pixels), target_groups(labels)
    return {name: _r2(found[name], wanted[name]) for name in TARGETS}


def _r2(found: Tensor, wanted: Tensor) -> float:
    rest = (found - wanted).square().sum()
    return 1 - (rest / (wanted - wanted.mean(dim=0)).square().sum()).item()
