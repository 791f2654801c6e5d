"""Trackers: programs and files beside log.jsonl that a run sends its `train` and `eval` lines to.

    sink           what a tracker is, and how its curves are named
    chosen         the trackers that a recipe names, and the packages that they need
    background     the thread that writes to them, so that none can end or slow a run
    to_wandb, to_tensorboard, to_csv, to_mlflow      one tracker each

Start with `sink` and `background`.
"""
