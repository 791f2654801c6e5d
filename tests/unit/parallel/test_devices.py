"""Which device a rank takes, and which choices of the ranks do not fit together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from sfa_dist.errors import LostRankError, PreemptedError, RecipeError, UsageError
from sfa_dist.parallel import devices
from sfa_dist.parallel.devices import CPU, Place, agree, choose_device, core_sharers, fault_of, own_place
from sfa_dist.parallel.environment import temporarily
from sfa_dist.parallel.launch import Launch
from sfa_dist.parallel.rendezvous import LIMIT_VARIABLE, RendezvousConfig, mark_stopped, read_rendezvous
from sfa_dist.recipe.schema import load_recipe
from sfa_dist.stages.prepare import require_precisions

ROOT = Path(__file__).parents[3]


def launch(local_rank: int = 0, ranks: int = 4) -> Launch:
    return Launch("srun", local_rank, ranks, local_rank, ranks)


def show_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes torch say that it sees so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.fixture
def without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """torch sees none; the folder stands for /dev."""
    show_gpus(monkeypatch, 0)
    monkeypatch.setattr(devices, "DEV", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"),
    [(0, 4, 0), (3, 4, 3), (0, 1, 0), (3, 1, 0)],
    ids=["the first of all", "the last of all", "the only one", "a rank that is shown only its own"],
)
def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch, local_rank: int, visible: int, index: int) -> None:
    show_gpus(monkeypatch, visible)
    assert choose_device("auto", launch(local_rank), {}) == torch.device("cuda", index)
    assert choose_device("cuda", launch(local_rank), {}) == torch.device("cuda", index)


def test_fewer_gpus_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 2)
    with pytest.raises(UsageError, match=r"local rank 3 has no GPU of its own: .* shows it 2; start fewer ranks"):
        choose_device("auto", launch(3), {})


def test_the_cpu_where_nothing_speaks_of_gpus(without_gpus: Path) -> None:
    (without_gpus / "nvidia-caps").mkdir()
    for environ in ({}, {"SLURM_GPUS": "0"}, {"SLURM_GPUS_ON_NODE": ""}):
        assert choose_device("auto", launch(), environ) == CPU


@pytest.mark.parametrize("variable", devices.GPU_VARIABLES)
def test_a_job_with_gpus_does_not_train_on_the_cpu_unasked(without_gpus: Path, variable: str) -> None:
    assert without_gpus.is_dir()
    with pytest.raises(UsageError, match=rf"torch can use no GPU on .*the job has GPUs \({variable}=2\).*device: cpu"):
        choose_device("auto", launch(), {variable: "2"})


def test_a_machine_with_gpus_does_not_train_on_the_cpu_unasked(without_gpus: Path) -> None:
    (without_gpus / "nvidia0").touch()
    with pytest.raises(UsageError, match=r"torch can use no GPU .*nvidia0 is there\. Compare the driver"):
        choose_device("auto", launch(), {})
    for hiding in devices.HIDING:
        assert choose_device("auto", launch(), {"CUDA_VISIBLE_DEVICES": hiding}) == CPU


def test_a_gpu_that_is_wanted_and_hidden(without_gpus: Path) -> None:
    assert without_gpus.is_dir()
    with pytest.raises(UsageError, match=r"device: cuda, but CUDA_VISIBLE_DEVICES hides all GPUs of .*: unset it"):
        choose_device("cuda", launch(), {"CUDA_VISIBLE_DEVICES": ""})


def test_the_cpu_on_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 4)
    with temporarily("CUDA_VISIBLE_DEVICES", "0,1,2,3"):
        assert choose_device("cpu", launch(), {}) == CPU
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("capability", "has"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((10, 0), True)])
def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    gpu = torch.device("cuda", 0)
    for set_, key in (
        ("engine.precision=bf16", "stage1.engine.precision"),
        ("stage2.trunk_precision=int8", "stage2.trunk"),
    ):
        recipe = load_recipe(str(ROOT / "recipes/demo.yaml"), [set_], {}).recipe
        stages = {"stage1": recipe.stage1, "stage2": recipe.stage2}
        require_precisions(stages, CPU)
        if has:
            require_precisions(stages, gpu)
        else:
            with pytest.raises(RecipeError, match=rf"{key}.*: bf16 needs .* 8.0 or more, and Tesla V100 has 7"):
                require_precisions(stages, gpu)
    plain = load_recipe(str(ROOT / "recipes/demo.yaml"), [], {}).recipe
    require_precisions({"stage1": plain.stage1}, gpu)


def test_the_place_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_place(CPU).gpu == ""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"of {device}"))
    place = own_place(torch.device("cuda", 1))
    assert place.gpu == "of cuda:1"
    assert set(place.cores) == os.sched_getaffinity(0)


def places(*gpus: str) -> list[Place]:
    """One rank for each, two ranks a node."""
    return [Place(f"node{rank // 2}", gpu, (0,)) for rank, gpu in enumerate(gpus)]


def test_ranks_that_fit_together() -> None:
    assert fault_of(places("", "", "")) == ""
    assert fault_of(places("a", "b", "a", "b")) == ""  # The same UUID on another node would be another GPU.


def test_a_gpu_on_some_ranks_only() -> None:
    assert "rank 2 on node1 has no GPU (1 of 3 ranks have none)" in fault_of(places("a", "b", ""))


def test_two_ranks_with_one_gpu() -> None:
    assert fault_of(places("a", "b", "c", "c")).startswith(
        "ranks 2 and 3 on node1 have the same GPU, c: start one rank"
    )


def test_a_rank_without_a_device() -> None:
    assert fault_of([*places("a"), Place("node0", "", (0,), "torch can use no GPU")]) == "rank 1: torch can use no GPU"


@pytest.mark.parametrize(
    ("cores", "sharers"),
    [
        ([(0, 1, 2, 3), (0, 1, 2, 3)], [2, 2]),
        ([(0, 1), (2, 3)], [1, 1]),
        ([(0, 1), (1, 2), (3,)], [2, 2, 1]),
    ],
    ids=["all of a node's", "bound apart", "overlapping"],
)
def test_ranks_that_share_cores(cores: list[tuple[int, ...]], sharers: list[int]) -> None:
    assert core_sharers([Place("node0", "", own) for own in cores]) == sharers


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=6))
def test_shares_of_cores_never_exceed_the_cores(cores: list[set[int]]) -> None:
    """Where each rank takes its share, no core has more than one rank's worth of work."""
    own = [Place("node0", "", tuple(sorted(each))) for each in cores]
    load = dict.fromkeys(range(10), 0.0)
    for place, sharers in zip(own, core_sharers(own), strict=True):
        assert 1 <= sharers <= len(own)
        for core in place.cores:
            load[core] += 1 / sharers
    assert max(load.values()) <= 1 + 1e-9


def in_threads(*ranks: Callable[[dist.Store], None]) -> None:
    """Runs the ranks of one store to their ends."""
    store = dist.HashStore()
    threads = [threading.Thread(target=rank, args=(store,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def config(rank: int, ranks: int, seconds: str = "30") -> RendezvousConfig:
    environ = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", LIMIT_VARIABLE: seconds}
    return read_rendezvous(environ, launch(rank, ranks))


@pytest.mark.parametrize("error", ["", "torch can use no GPU"])
def test_all_ranks_learn_of_one_ranks_fault(error: str) -> None:
    outcomes: dict[int, int | str] = {}

    def rank(number: int, store: dist.Store) -> None:
        own = Place("node0", "", (number // 2,), error if number == 2 else "")
        try:
            outcomes[number] = agree(own, config(number, 3), store)
        except UsageError as refusal:
            outcomes[number] = str(refusal)

    in_threads(*(partial(rank, number) for number in range(3)))
    assert outcomes == ({0: 2, 1: 2, 2: 1} if not error else dict.fromkeys(range(3), f"rank 2: {error}"))


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_is_asked_to_stop_is_not_waited_for(number: int) -> None:
    def rank(store: dist.Store) -> None:
        mark_stopped(store)
        with pytest.raises(PreemptedError):
            agree(Place("node0", "", (0,)), config(number, 2), store)
        done.append(number)

    done: list[int] = []
    in_threads(rank)
    assert done == [number]


def test_a_rank_that_never_answers_is_told() -> None:
    def rank(store: dist.Store) -> None:
        with pytest.raises(LostRankError, match=r"rank 0 of 2 on .*: no answer in 1 s .*places/1"):
            agree(Place("node0", "", (0,)), config(0, 2, "1"), store)
        done.append(0)

    done: list[int] = []
    in_threads(rank)
    assert done == [0]
