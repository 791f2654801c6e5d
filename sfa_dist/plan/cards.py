"""The table of cards: memory, matrix speed, and the memory that is kept back for what no plan can see.

Memory is the total that torch reports (`get_device_properties().total_memory`), which is less than the number on the
box. Peaks are from the vendors' data sheets, dense, without sparsity: bf16 on tensor cores, fp32 outside them (torch's
default; TF32 is off). The sustained speed is an assumption, not a measurement: a share of the peak.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from sfa_dist.errors import UsageError

GIB = 2**30
BF16_SHARE = 0.40  # Of the bf16 peak: what well-fed training of large transformers reaches (400 TFLOP/s on an H100).
FP32_SHARE = 0.60  # Of the fp32 peak: plain matrix products come closer to a smaller peak.
RESERVE_BYTES = GIB  # CUDA context, cuBLAS and attention workspaces, NCCL's buffers.
RESERVE_SHARE = 0.08  # Of the allocated peak: fragmentation of the caching allocator.


@dataclass(frozen=True)
class Card:
    """A card with `gib` of memory; `bf16` and `fp32` are its peaks in TFLOP/s.

    `has_bf16` is false before Ampere, `has_fp8` before Ada and Hopper. A card that is only a number of GiB is assumed
    to have both.
    """

    name: str
    gib: float
    bf16: float | None
    fp32: float | None
    has_bf16: bool = True
    has_fp8: bool = True

    def sustained_tflops(self, precision: str) -> float | None:
        """TFLOP/s that the time model assumes; None where the card is only a number of GiB."""
        if precision == "bf16" and self.has_bf16:
            return None if self.bf16 is None else BF16_SHARE * self.bf16
        return None if self.fp32 is None else FP32_SHARE * self.fp32


CARDS = (
    Card("B200", 178.4, 2250.0, 75.0),
    Card("H200", 139.8, 989.0, 67.0),
    Card("H100", 79.1, 989.0, 67.0),
    Card("A100-80", 79.1, 312.0, 19.5, has_fp8=False),
    Card("A100-40", 39.4, 312.0, 19.5, has_fp8=False),
    Card("V100-32", 31.7, 125.0, 15.7, has_bf16=False, has_fp8=False),
    Card("V100-16", 15.8, 125.0, 15.7, has_bf16=False, has_fp8=False),
    Card("L40S", 44.4, 362.0, 91.6),
    Card("A6000", 47.5, 155.0, 38.7, has_fp8=False),
    Card("A10", 22.0, 125.0, 31.2, has_fp8=False),
    Card("L4", 22.0, 121.0, 30.3),
    Card("T4", 14.6, 65.0, 8.1, has_bf16=False, has_fp8=False),
    Card("RTX4090", 23.6, 165.0, 82.6),
    Card("RTX3090", 23.7, 71.0, 35.6, has_fp8=False),
    Card("2080Ti", 10.7, 54.0, 13.4, has_bf16=False, has_fp8=False),
)
DEFAULT_CARD = "H100"


def find_card(name: str) -> Card:
    """The card of this name, in any case, with or without `RTX`. Raises UsageError with the nearest name."""
    wanted = _plain(name)
    by_name = {_plain(card.name): card for card in CARDS}
    if wanted in by_name:
        return by_name[wanted]
    family = [card.name for card in CARDS if _plain(card.name).startswith(wanted)] if wanted else []
    near = family or [by_name[match].name for match in difflib.get_close_matches(wanted, by_name, n=2)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(card.name for card in CARDS)};"
    raise UsageError(f"--card {name}: not in the table; {hint} --gib N takes any other")


def card_of_size(gib: float) -> Card:
    """A card of which only the memory is known."""
    return Card(f"{gib:g} GiB", gib, None, None)


def with_memory(card: Card, gib: float) -> Card:
    """The card with another amount of memory."""
    return replace(card, gib=gib)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "").removeprefix("rtx").removesuffix("gb")


def peak_tflops(device_name: str) -> float | None:
    """The 16-bit matrix peak in TFLOP/s of a card, by its driver's name for it; None for what is not in the table."""
    words = _plain(device_name)
    # A100 before A10, L40S before L4: the longest name that fits.
    fitting = [card for card in CARDS if _plain(card.name.split("-")[0]) in words]
    return max(fitting, key=lambda card: len(card.name.split("-")[0])).bf16 if fitting else None


def reserve_bytes(peak: int) -> int:
    """Bytes that a plan keeps back on top of `peak` allocated bytes."""
    return RESERVE_BYTES + int(RESERVE_SHARE * peak)


def largest_peak(card: Card) -> int:
    """The allocated bytes that fill a card together with their reserve."""
    return int((card.gib * GIB - RESERVE_BYTES) / (1 + RESERVE_SHARE))
