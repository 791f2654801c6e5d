"""What a run directory holds, and who writes it: `result.json`, `log.jsonl`, `report.html` and the rest.

    context    what all stages of a run share      lock      one process per run directory
    attempts   how earlier starts ended            record    `recipe.yaml`, `env.json`, `done.json`
    tracking   log.jsonl, console, wandb           report/   the page of a run, or of several
    command_line  the parser, errors and exit codes   train_options  the options of a training run
    chance     is a score better than guessing     out_of_memory  what to change when memory runs out
    intervals  how sure one can be of a score
    session    what a start opens and closes, in which order

Start with `context`.
"""
