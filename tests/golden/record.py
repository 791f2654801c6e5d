"""Records tests/golden/losses.tsv anew: python tests/golden/record.py [--out FILE]

To be done where a change of numbers is meant, in the commit that makes it. What is recorded stands in
tests/distributed/golden_runs.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs every golden run and writes the file."""
    sys.path[:0] = [str(TESTS / "distributed")]
    import conftest  # noqa: F401 - makes the helpers importable, also in the processes that they start
    from golden_runs import GOLDEN, RUNS, golden_run, refused_here, write_golden

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    out: Path = parser.parse_args().out
    for name in RUNS:
        if reason := refused_here(name):
            sys.exit(f"{name}: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        write_golden(out, {key: pair for name in RUNS for key, pair in golden_run(name, Path(folder)).items()})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
