"""Faults that no file and no signal from outside makes, put into the process of a forked train.py."""

from __future__ import annotations

from itertools import count

import faulty_decoder

VARIABLE = "TEST_FAULTS"  # Separated by semicolons.


def install(fault: str) -> None:
    """`decoder ACTION@CRC32` (faulty_decoder.py), or `nan_loss N`: the first N losses are not finite."""
    kind, _, rest = fault.partition(" ")
    if kind == "decoder":
        faulty_decoder.install(rest)
    else:
        assert kind == "nan_loss", fault
        _spoil_losses(int(rest))


def _spoil_losses(number: int) -> None:
    from sfa_dist import trainer

    whole, calls = trainer.weighted_loss_sum, count()
    trainer.weighted_loss_sum = lambda *a: whole(*a) * (float("nan") if next(calls) < number else 1.0)
