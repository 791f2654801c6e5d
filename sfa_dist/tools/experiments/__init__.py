"""The paper's tables and figures as experiments: what `sfa reproduce` trains, and what it writes.

`rows.py` describes each table, with the paper's numbers; a row is a shipped recipe and overrides of its keys.
`scales.py` says which recipe and how many frames that is at a scale, `clips.py` makes the clips of the small ones.
`steps.py` cuts a row into runs, so that rows share equal stages, and `execution.py` starts them. `results.py` reads
what they have found, `pages.py` shows it beside the paper's numbers, and `jobs.py` writes the runs as Slurm jobs. Start
with `rows.py`.
"""
