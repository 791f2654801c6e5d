"""What a run consists of, in the order in which it runs. Nothing is imported here: the command line reads it first."""

from __future__ import annotations

CACHE, TEST, REPORT = "cache", "test", "report"
STAGE_NAMES = ("image", "stage1", "stage2")  # What is trained.
# What `--stage` names: what leaves a folder with `done.json`, and the report on all of it.
RUN_STEPS = ("image", "stage1", CACHE, "stage2", TEST, REPORT)
