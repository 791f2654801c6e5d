"""The exact engine, `engine.reduction: tree`: the same bits on 1, 2, 4, ... ranks.

A sum of floats depends on its order, and in the other engines the order depends on the number of ranks. Here a step's
gradient is the sum over the recipe's V = batch.size / batch.micro micro-batches, in an order that V alone fixes:
V is halved as long as it is even, and an odd number of micro-batches is summed from left to right.

    V = 8:  ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))        V = 6:  ((0 + 1) + 2) + ((3 + 4) + 5)

Each rank holds consecutive micro-batches (`SamplePlan.micro_batch_ids`). If the number of ranks is a power of two and
divides V, each rank holds a whole branch of the tree. Parameters and moments are replicated, as in ZeRO 0: this engine
is for audits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfa_dist.errors import RecipeError
from sfa_dist.parallel.engines.engine import Fragment
from sfa_dist.parallel.engines.optimizers import clipped_step, make_optimizer, moments_of, reset_state
from sfa_dist.parallel.environment import set_default
from sfa_dist.recipe.schema import StageBlock


class ExactEngine:
    """`module` replicated on every rank in fp32; under autocast for `engine.precision: bf16`.

    `accumulation` micro-batches of a rank make a step. Raises RecipeError if V does not suit the number of ranks.
    """

    owners = 1

    def __init__(self, module: nn.Module, stage: StageBlock, accumulation: int, device: torch.device) -> None:
        world = dist.get_world_size()
        self._micro_batches = stage.batch.size // stage.batch.micro
        if why := stage.engine.refusal_of(world, self._micro_batches):
            raise RecipeError(why)
        _make_deterministic(device)
        self.module = module.to(device)
        self.clip_norm = stage.optimizer.clip_norm
        self.moments = moments_of(stage.optimizer)
        self._bf16 = torch.autocast(device.type, torch.bfloat16, enabled=stage.engine.precision == "bf16")
        self._parameters = dict(self.module.named_parameters())
        self._optimizer = make_optimizer(self._parameters, stage.optimizer)
        self._sum = TreeSum(accumulation)

    def forward(self, inputs: object) -> Tensor:
        self.module.train()
        with self._bf16:
            return self.module(inputs)

    @torch.no_grad()
    def evaluate(self, inputs: object) -> Tensor:
        self.module.eval()
        with self._bf16:
            return self.module(inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        # Into one vector of its own: accumulating in .grad would sum from left to right.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters.values()]
        self._sum.add(torch.cat([gradient.flatten() for gradient in gradients]))
        self._optimizer.zero_grad()
        if last:
            whole = sum_over_ranks(self._sum.take()).div_(self._micro_batches)
            sizes = [p.numel() for p in self._parameters.values()]
            for parameter, gradient in zip(self._parameters.values(), whole.split(sizes), strict=True):
                parameter.grad = gradient.view_as(parameter)

    def step(self, lr: float) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        return clipped_step(self._optimizer, lr, norm, self.clip_norm)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self._parameters.items()}

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            tensors = {"master": parameter.detach().view(-1)}
            tensors |= {key: state[key].view(-1) for key in self.moments if key in state}
            yield Fragment(name, 0, parameter.numel(), tensors)

    def make_optimizer_state(self, step: int) -> None:
        reset_state(self._optimizer, self._parameters.values(), self.moments, step)

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}

    def optimizer_bytes(self) -> int:
        return sum(4 * f.numel * (1 + len(self.moments)) for f in self.fragments())


class TreeSum:
    """The sum of `leaves` tensors, added one at a time, in the order described at the top of this file.

    It works in place, in the memory of the tensors that it is given, and holds at most log2(leaves) + 1 of them.
    """

    def __init__(self, leaves: int) -> None:
        self._odd = leaves // (leaves & -leaves)  # The odd factor of `leaves`.
        self._run: Tensor | None = None
        self._in_run = 0
        self._branches: list[tuple[int, Tensor]] = []  # (height, sum), in order of falling height.

    def add(self, leaf: Tensor) -> None:
        """Adds the next tensor, whose memory is the sum's from now on."""
        self._run = leaf if self._run is None else self._run.add_(leaf)
        self._in_run += 1
        if self._in_run == self._odd:
            branch, height = self._run, 0
            while self._branches and self._branches[-1][0] == height:
                branch = self._branches.pop()[1].add_(branch)
                height += 1
            self._branches.append((height, branch))
            self._run, self._in_run = None, 0

    def take(self) -> Tensor:
        """The sum, after the last leaf. The next `add` begins a new sum."""
        [(_, total)] = self._branches
        self._branches.clear()
        return total


def sum_over_ranks(vector: Tensor) -> Tensor:
    """The upper branches of the tree: the sum (n,) of all ranks' vectors (n,), added in pairs of neighbours.

    Each rank sums one part of the vectors and sends it to all: as many bytes as an all-reduce moves. The number of
    ranks is a power of two. Collective.
    """
    world = dist.get_world_size()
    if world == 1:
        return vector
    padded = torch.nn.functional.pad(vector, (0, -len(vector) % world))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded)
    rows = parts.view(world, -1)  # Row r comes from rank r.
    while len(rows) > 1:
        rows = rows[0::2] + rows[1::2]
    dist.all_gather_into_tensor(padded, rows.flatten())
    return padded[: len(vector)]


def _make_deterministic(device: torch.device) -> None:
    """Makes torch use kernels that add in the same order each time, and raise where there is none."""
    if device.type == "cuda":
        set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts.
        torch.use_deterministic_algorithms(True)
    else:
        torch.set_num_threads(1)  # Launchers set the threads per rank according to the number of ranks.
