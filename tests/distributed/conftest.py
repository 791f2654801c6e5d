"""Makes `ranks` importable, here and in the processes that the tests start."""

import os
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
