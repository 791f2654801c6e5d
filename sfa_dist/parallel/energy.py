"""The energy that the ranks' GPUs take over a stage, from the counters of NVIDIA's driver (NVML).

A counter is of a whole card, in millijoules, from Volta on: other processes on the card count too. It is read twice a
stage, never in a step. The library comes with the driver and is called as torch calls it (torch/cuda/__init__.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sfa_dist.parallel.runtime import Runtime

NVML = "libnvidia-ml.so.1"
JOULES, REASON = "energy_joules", "energy_reason"  # Keys of a stage's result.

Counter = Callable[[], float]  # Joules since the driver was loaded. Raises NoEnergyError.

Opener = Callable[[torch.device], tuple[str, Counter]]  # To (the card, its counter). Raises NoEnergyError.


class NoEnergyError(Exception):
    """Why the energy is not known, in words."""


@dataclass(frozen=True)
class EnergyMeter:
    """What a rank's card has counted since the meter was made; `reason` is why nothing is counted."""

    card: str
    counter: Counter | None
    began: float
    reason: str = ""

    @classmethod
    def start(cls, device: torch.device, opened: Opener | None = None) -> EnergyMeter:
        """The meter of a rank's device. Raises nothing: where there is no counter, it has a reason."""
        try:
            card, counter = (opened or nvml_counter)(device)
            return cls(card, counter, counter())
        except NoEnergyError as error:
            return cls("", None, 0.0, str(error))

    def taken(self) -> tuple[str, float | None, str]:
        """(card, joules, why there are none)."""
        if self.counter is None:
            return self.card, None, self.reason
        try:
            joules = self.counter() - self.began
        except NoEnergyError as error:
            return self.card, None, str(error)
        return (self.card, joules, "") if joules >= 0 else (self.card, None, "the driver's counter went back")


def energy_result(meter: EnergyMeter, runtime: Runtime) -> dict[str, Any]:
    """The keys of a stage's result: JOULES of all cards, each counted once, or null and the REASON. Collective."""
    of_cards: dict[tuple[str, str], float] = {}
    for host, (card, joules, reason) in runtime.gather((runtime.host, meter.taken())):
        if joules is None:
            return unknown_energy(reason)
        of_cards[host, card] = max(joules, of_cards.get((host, card), 0.0))  # Ranks may share a card.
    return {JOULES: sum(of_cards.values())}


def unknown_energy(reason: str) -> dict[str, Any]:
    """The keys of a stage whose energy is not known."""
    return {JOULES: None, REASON: reason}


def nvml_counter(device: torch.device) -> tuple[str, Counter]:
    """(the card's UUID, its counter). Raises NoEnergyError."""
    if device.type != "cuda":
        raise NoEnergyError("it ran on CPUs, whose energy is not read")
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return uuid, counter_of(ctypes.CDLL(NVML), uuid)
    except (OSError, AttributeError) as error:  # No such library, or one without these functions.
        raise NoEnergyError(f"the driver's {NVML} cannot be used ({error})") from error


def counter_of(nvml: Any, uuid: str) -> Counter:
    """The counter of a card. Raises NoEnergyError, AttributeError."""
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    handle = ctypes.c_void_p()
    _require(nvml, nvml.nvmlInit_v2(), "NVML")
    _require(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)), uuid)
    read = nvml.nvmlDeviceGetTotalEnergyConsumption  # Here: a library without it is told by AttributeError.

    def joules() -> float:
        millijoules = ctypes.c_ulonglong()
        code = read(handle, ctypes.byref(millijoules))
        _require(nvml, code, f"the energy of {uuid}")
        return millijoules.value / 1000

    return joules


def _require(nvml: Any, code: int, what: str) -> None:
    if code:
        raise NoEnergyError(f"the driver refuses {what}: {(nvml.nvmlErrorString(code) or b'?').decode()}")
