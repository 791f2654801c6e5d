"""A killed run resumes elsewhere: on other ranks, with other workers, under the other engine."""

from __future__ import annotations

import signal

from sfa_dist.chaos.bench import PATIENCE_S, TREE, Bench
from sfa_dist.chaos.trials import MOVES, trial

OTHER_RANKS = {1: 2, 2: 1}


def _elsewhere(bench: Bench) -> int:
    return OTHER_RANKS.get(bench.ranks, bench.ranks // 2)


@trial(MOVES, "resume on another number of ranks", rows=(27,))
def other_ranks(bench: Bench) -> str:
    """The state is the same; sums over other ranks round differently."""
    bench.killed_run()
    bench.complete(ranks=_elsewhere(bench))
    gap = bench.close_to("run", bench.ranks)
    return f"{bench.ranks} -> {_elsewhere(bench)} ranks: losses within {gap:.1e} of those on {bench.ranks}"


@trial(MOVES, "resume on another number of ranks, exact reduction", rows=(27,), on="powers of two")
def other_ranks_exactly(bench: Bench) -> str:
    """With engine.reduction: tree the sums do not depend on the ranks."""
    bench.killed_run(sets=TREE)
    bench.complete(ranks=_elsewhere(bench), sets=TREE)
    steps = bench.same_bits(sets=TREE)
    return f"{bench.ranks} -> {_elsewhere(bench)} ranks: {steps} steps, the same bits"


@trial(MOVES, "resume under the other engine", rows=(27,))
def other_engine(bench: Bench) -> str:
    """A checkpoint of DeepSpeed resumes under FSDP2, and the other way round."""
    engine = bench.workplace.stages[bench.first_stage].engine
    other = ("engine.name=fsdp", "deepspeed=null") if engine.name == "deepspeed" else ("engine.name=deepspeed",)
    if not bench.workplace.stages[bench.first_stage].deepspeed:
        other = other[:1]
    bench.killed_run()
    bench.complete(sets=other)
    gap = bench.close_to("run", bench.ranks)
    return f"{engine.name} -> {other[0].removeprefix('engine.name=')}: losses within {gap:.1e}"


@trial(MOVES, "resume with other loader workers", rows=(28,))
def other_workers(bench: Bench) -> str:
    """From no worker to two, then to one."""
    bench.killed_run()
    job = bench.start(sets=("data.workers=2",))
    bench.until_step(job, bench.workplace.steps - 3)
    job.send_to_groups(signal.SIGKILL)
    job.ends(PATIENCE_S)
    bench.complete(sets=("data.workers=1",))
    return f"0 -> 2 -> 1 workers: {bench.same_bits()} steps, the same bits"
