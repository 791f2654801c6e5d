"""What a stage's GPUs took: two readings of the driver's counter, or a reason why there are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfa_dist.parallel import energy
from sfa_dist.parallel.energy import (
    EnergyMeter,
    NoEnergyError,
    counter_of,
    energy_result,
    nvml_counter,
    unknown_energy,
)

CARD = torch.device("cuda", 0)


def meter(*readings: float, card: str = "GPU-1") -> EnergyMeter:
    left = list(readings)

    def counter() -> float:
        if not left:
            raise NoEnergyError("the card is lost")
        return left.pop(0)

    return EnergyMeter.start(CARD, lambda device: (card, counter))


def result_of(*of_ranks: tuple[str, EnergyMeter]) -> dict[str, Any]:
    """Of ranks on (host, meter)."""
    told = [(host, each.taken()) for host, each in of_ranks]
    runtime: Any = SimpleNamespace(host=told[0][0], gather=lambda own: told)
    idle = EnergyMeter("", None, 0.0, "replaced by what the ranks told")
    return energy_result(idle, runtime)


def test_it_is_what_was_counted_in_between() -> None:
    assert meter(1000.0, 3500.0).taken() == ("GPU-1", 2500.0, "")


def test_cards_add_up_and_a_shared_one_counts_once() -> None:
    shared = ("a", meter(0.0, 10.0)), ("a", meter(0.0, 11.0))
    assert result_of(*shared, ("a", meter(0.0, 5.0, card="GPU-2")), ("b", meter(0.0, 1.0))) == {"energy_joules": 17.0}


@pytest.mark.parametrize(
    ("readings", "why"),
    [((5.0, 4.0), "the driver's counter went back"), ((5.0,), "the card is lost"), ((), "the card is lost")],
)
def test_a_rank_without_a_number_makes_it_unknown(readings: tuple[float, ...], why: str) -> None:
    assert result_of(("a", meter(0.0, 1.0)), ("b", meter(*readings))) == unknown_energy(why)


def test_cpus_have_a_reason() -> None:
    with pytest.raises(NoEnergyError, match="it ran on CPUs"):
        nvml_counter(torch.device("cpu"))
    assert EnergyMeter.start(torch.device("cpu")).taken() == ("", None, "it ran on CPUs, whose energy is not read")


def test_a_card_without_the_drivers_library_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1"))
    monkeypatch.setattr("sfa_dist.parallel.energy.NVML", "libno-such-library.so")
    with pytest.raises(NoEnergyError, match=r"libno-such-library.so cannot be used"):
        nvml_counter(CARD)


def nvml(refused: str = "") -> Any:
    """The functions of libnvidia-ml.so that are called, for a card GPU-1; `refused` names one that fails."""

    def handle_of(uuid: bytes, handle: Any) -> int:
        handle._obj.value = 7
        return 3 * (refused == "handle" or uuid != b"GPU-1")

    def energy_of(handle: Any, energy: Any) -> int:
        energy._obj.value = 2_500
        return 3 * (refused == "energy" or handle.value != 7)

    return SimpleNamespace(
        nvmlErrorString=lambda code: b"Not Supported",
        nvmlInit_v2=lambda: 3 * (refused == "init"),
        nvmlDeviceGetHandleByUUID=handle_of,
        nvmlDeviceGetTotalEnergyConsumption=energy_of,
    )


def test_the_driver_counts_millijoules_of_the_ranks_own_card() -> None:
    assert counter_of(nvml(), "GPU-1")() == 2.5


@pytest.mark.parametrize("refused", ["init", "handle", "energy"])
def test_what_the_driver_refuses_is_said(refused: str) -> None:
    with pytest.raises(NoEnergyError, match=r"the driver refuses .*: Not Supported"):
        counter_of(nvml(refused), "GPU-1")()


def test_a_library_without_the_counter_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    old = nvml()
    del old.nvmlDeviceGetTotalEnergyConsumption
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: old)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    card, joules, why = EnergyMeter.start(CARD).taken()
    assert (card, joules) == ("", None)
    assert "nvmlDeviceGetTotalEnergyConsumption" in why
