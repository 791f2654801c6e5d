"""Makes the helpers importable, here and in the processes that the tests start."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDERS = [str(HERE), str(HERE.parent / "distributed"), str(HERE.parent / "unit")]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
