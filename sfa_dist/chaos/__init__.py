"""Faults on purpose: the guarantees of a recipe's run, tested on real processes, shards and checkpoints.

    trials       what a trial is; trials_{checkpoints,data,elastic,processes} are the trials, all_trials their list
    bench        a trial's runs and checks                    oracle     compares a run directory with another
    workplace    a small copy of the recipe and its data      builtin    the built-in recipe
    injectors    damage to files and disks                    processes  runs as real processes
    trial_table  the results as a table and as JSON

Start with `trials`.
"""
