"""The parts of gpu.sh, each a program with a time limit of its own, and their results in one JSON and one Markdown.

A part is done when its whole JSON stands in the results' folder, and is not run again. One that fails or runs out of
time leaves its output in `<part>.log`, and the rows that it has in its JSON; the others go on, and the program ends
with 70 so that no one takes it for whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, describe, machine, markdown, write_json

BENCHMARKS = Path(__file__).resolve().parent
TOTAL_SECONDS = 530
TINY = ("model.size=tiny", "model.image_size=32", "model.temporal_depth=1", "data.resize=32", "engine.precision=fp32")
PATIENCE_WHEN_TINY = 6  # A CPU that tries the script may be busy with other things.
INCOMPLETE = 70


@dataclass(frozen=True)
class Part:
    """A program, at most `seconds` of it. `read` makes its result of its output; None: it writes `--json` itself."""

    name: str
    seconds: int
    program: list[str]
    read: Callable[[int, str], dict[str, Any]] | None = None


def script(name: str, *arguments: str) -> list[str]:
    """A benchmark beside this file."""
    return [str(BENCHMARKS / f"{name}.py"), *arguments]


def recipe(name: str) -> list[str]:
    """The option for a recipe of the project."""
    return ["--recipe", str(ROOT / "recipes" / f"{name}.yaml")]


def parts(tiny: bool) -> list[Part]:
    """All parts, the most wanted first; together they stay under nine minutes. `tiny`: the same with tiny models."""
    small = [part for key in TINY for part in ("--set", key)] if tiny else []
    rounds = ["--rounds", "5"]
    long_h, long_g = (["4"], ["4"]) if tiny else (["8", "96"], ["8", "48", "256"])
    frames, cases = ("4", ["tiny"]) if tiny else ("32", ["B", "L", "H", "g"])
    sizes = ["tiny"] if tiny else ["B", "L"]
    tests = ["-m", "pytest", "-q", "-m", "gpu", *gpu_test_files()]
    probe = ["-m", "sfa_dist.tools.cli", "plan", *recipe("h_96f"), "--stage", "stage2", "--json", *small]
    few = ["--set", "stage2.frames=4"] if tiny else []
    found = [
        Part("one_step_g", 50, script("one_step", *recipe("g_48f"), "--steps", "3", *small, *few)),
        Part("one_step_h", 40, script("one_step", *recipe("h_96f"), "--steps", "3", *small, *few)),
        Part("memory_h", 45, script("memory", *recipe("h_96f"), "--frames", *long_h, *rounds, *small)),
        Part("memory_g", 60, script("memory", *recipe("g_48f"), "--frames", *long_g, *rounds, *small)),
        Part("step_b", 30, script("step", *recipe("b_32f"), "--frames", frames, "--batch", "8", *rounds, *small)),
        Part("step_l", 40, script("step", *recipe("l_128f"), "--frames", frames, "--batch", "2", *rounds, *small)),
        Part("plan_probe", 45, probe if tiny else [*probe, "--probe"], read_plan),
        Part("against_timm", 20, script("against_timm", "--sizes", *sizes, *rounds)),
        Part("tests", 70, [*tests, "--collect-only"] if tiny else tests, read_tests),
        Part("cost", 40, script("cost", "project", *rounds, *small, *(["--recipes", "b_32f"] if tiny else []))),
    ]
    if (BENCHMARKS / "trunk.py").is_file():
        found.insert(2, Part("trunk", 100, script("trunk", "--sizes", *cases, *rounds)))
    return found


def gpu_test_files() -> list[str]:
    """The files with tests that need a GPU: to collect all tests takes two minutes."""
    marked = (path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    return sorted(map(str, marked))


def is_whole(result: Path) -> bool:
    """Whether a part was run to its end."""
    return result.is_file() and bool(json.loads(result.read_text()).get("whole", True))


def read_plan(code: int, output: str) -> dict[str, Any]:
    """The plan's JSON, as a row of its plain values. Raises ValueError where it was not printed; that it does not fit
    (78) is a result."""
    told = json.loads(output[output.index("{") :])
    columns = [key for key, value in told.items() if isinstance(value, int | float | str)]
    return {"title": "sfa plan --probe", "columns": columns, "rows": [[told[key] for key in columns]], "plan": told}


def read_tests(code: int, output: str) -> dict[str, Any]:
    """The last line of pytest. Raises ValueError where a test failed."""
    if code:
        raise ValueError(f"pytest ended with {code}")
    last = output.strip().splitlines()[-1]
    return {"title": "tests marked gpu", "columns": ["outcome"], "rows": [[last]]}


def run(part: Part, out: Path, environment: Mapping[str, str], seconds: float) -> str | None:
    """Runs a part and leaves its JSON in `out`; returns what went wrong, if anything did."""
    result, log = out / f"{part.name}.json", out / f"{part.name}.log"
    command = [sys.executable, *part.program, *([] if part.read else ["--json", str(result)])]
    with log.open("w+") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            rows = len(json.loads(result.read_text())["rows"]) if result.is_file() else 0
            return f"not done in {seconds:.0f} s{f', {rows} rows are kept' if rows else ''}; see {log}"
    if part.read:
        try:
            write_json(result, {"machine": machine(), **part.read(code, log.read_text())})
        except ValueError as error:
            return f"{error}; see {log}"
    elif code or not result.is_file():
        return f"ended with {code}; see {log}"
    return None


def merge(out: Path, names: list[str]) -> None:
    """results.json and results.md of all parts that are done."""
    done = {name: json.loads((out / f"{name}.json").read_text()) for name in names if (out / f"{name}.json").is_file()}
    write_json(out / "results.json", done)
    texts = []
    for name, told in done.items():
        title = told["title"] + ("" if told.get("whole", True) else " (stopped before its end)")
        table = markdown(told["columns"], told["rows"])
        texts.append(f"## {name}\n\n{title}  \n{describe(told['machine'])}\n\n{table}\n")
    (out / "results.md").write_text("# Measurements\n\n" + "\n".join(texts))


def main() -> int:
    """Runs what is not done yet, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to try the script itself")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--budget", type=float, default=TOTAL_SECONDS, help="seconds in all (default %(default)s)")
    arguments = parser.parse_args()
    on = machine()
    if arguments.device == "cuda" and on["gpu"] is None:
        print("error: no GPU here; --device cpu --tiny tries the script without one", file=sys.stderr)
        return 78
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {})
    label = on["gpu"] if arguments.device == "cuda" else on["cpu"]
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    out = Path(environment.get("OUT") or BENCHMARKS / "results" / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = parts(arguments.tiny)
    names = [part.name for part in wanted]
    if unknown := set(arguments.only or ()) - set(names):
        print(f"error: no part {', '.join(sorted(unknown))}; there are {', '.join(names)}", file=sys.stderr)
        return 64
    deadline = time.monotonic() + arguments.budget
    failed = 0
    for part in wanted:
        if part.name not in (arguments.only or names):
            continue
        if is_whole(out / f"{part.name}.json"):
            print(f"{part.name}: done before", flush=True)
            continue
        left = deadline - time.monotonic()
        started = time.monotonic()
        limit = min(part.seconds * (PATIENCE_WHEN_TINY if arguments.tiny else 1), left)
        wrong = run(part, out, environment, limit) if left > 0 else "no time left; run it again"
        failed += wrong is not None
        print(f"{part.name}: {wrong or f'done in {time.monotonic() - started:.0f} s'}", flush=True)
        merge(out, names)
    merge(out, names)
    print(f"results: {out / 'results.md'}")
    return INCOMPLETE if failed else 0


if __name__ == "__main__":
    sys.exit(main())
