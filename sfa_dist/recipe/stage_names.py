"""The stages and steps of a run, in order. Nothing is imported here: the command line needs these names first."""

from __future__ import annotations

CACHE, TEST, REPORT = "cache", "test", "report"
STAGE_NAMES = ("image", "stage1", "stage2")  # The stages that train.
# The steps that `--stage` names: each leaves a folder with `done.json`, except the report.
RUN_STEPS = ("image", "stage1", CACHE, "stage2", TEST, REPORT)
