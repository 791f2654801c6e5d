"""A watch process on a system that has neither pidfd nor /proc."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sfa_dist.parallel import process_state  # noqa: E402 (the path first)

if hasattr(os, "pidfd_open"):
    del os.pidfd_open
process_state.PROC = "/nowhere"
runpy.run_path(str(ROOT / "sfa_dist" / "parallel" / "watch" / "watch_process.py"), run_name="__main__")
