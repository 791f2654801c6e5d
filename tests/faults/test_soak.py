"""Runs that are stopped and started again, many times: the same bits at the end.

SFA_SOAK_CYCLES=300 python -m pytest -m chaos tests/faults/test_soak.py -s
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from sfa_dist.chaos.bench import PATIENCE_S, Bench, References, output_of
from sfa_dist.chaos.builtin import write_builtin
from sfa_dist.chaos.processes import Job
from sfa_dist.chaos.workplace import make_workplace
from sfa_dist.parallel.process_exit import exit_when_asked
from sfa_dist.recipe.schema import load_recipe

CYCLES = int(os.environ.get("SFA_SOAK_CYCLES", "12"))
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP)
STEPS = 12
MOST_STARTS = 60  # Of one run: then it does not come forward.


def stop_at_random(bench: Bench, job: Job, number: signal.Signals, longest: float) -> int:
    """The exit code of a job that is sent a signal at a random moment of the first `longest` seconds."""
    until = time.monotonic() + bench.chance.uniform(0.0, longest)
    while time.monotonic() < until and not job.over:
        time.sleep(0.01)
    job.send_to_groups(number) if bench.chance.random() < 0.5 else job.send(number)
    ends = job.ends(PATIENCE_S)
    [code] = {end.code for end in ends}
    # 70 is a Ctrl-C before the run is ready for it; a signal's own number, one before the process is.
    assert code in (0, 75, -number) or (code == 70 and number == signal.SIGINT), (number.name, code, output_of(ends))
    if code == 75:
        assert ends[0].err.startswith("stopped: "), (number.name, output_of(ends))
        assert ends[0].err.count("\n") == 1, (number.name, output_of(ends))
    return code


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_stopped_and_started_again_to_the_same_bits(tmp_path: Path) -> None:
    recipe = load_recipe(write_builtin(tmp_path / "builtin"))
    references = References(make_workplace(tmp_path / "place", recipe, "the built-in recipe", STEPS, False))
    references.undisturbed(1)
    codes: Counter[str] = Counter()
    cycles, runs, began = 0, 0, time.monotonic()
    with Bench(references, tmp_path / "bench", 1, random.Random(CYCLES)).closing() as bench:
        bench.complete("measured")
        longest = 0.7 * (time.monotonic() - began)  # From before the first step to near the last.
        while cycles < CYCLES:
            run, sets = f"run-{runs}", ("data.workers=1",) if runs % 2 else ()
            for _ in range(MOST_STARTS):
                number = bench.chance.choice(ENDS)
                code = stop_at_random(bench, bench.start(run, sets=sets, prepare=exit_when_asked), number, longest)
                if code == 0:
                    break
                cycles += 1
                codes[f"{number.name} {code}"] += 1
            bench.complete(run, sets=sets)
            bench.same_bits(run, ())
            runs += 1
            seconds = time.monotonic() - began
            print(f"{cycles} stops in {runs} runs, {seconds:.0f} s, all the same bits: {dict(codes)}", flush=True)
