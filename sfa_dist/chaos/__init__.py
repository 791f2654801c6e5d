"""Faults on purpose: what a recipe's run promises, tried on real processes, shards and checkpoints.

    trials       what a trial is; trials_{checkpoints,data,elastic,processes} are the trials, all_trials their list
    workplace    a small copy of the recipe and its data      bench   runs to compare with
    injectors    how files and disks are damaged              oracle  what a run directory says afterwards
    processes, builtin, trial_table

Start with `trials`.
"""
