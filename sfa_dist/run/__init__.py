"""What a run directory holds, and who writes it: `result.json`, `log.jsonl`, `report.html` and the rest.

    session    what a start opens and closes         context        what all stages of a run share
    attempts   how earlier starts ended              lock           one job at a time in a run directory
    tracking   log.jsonl and console                 record         `recipe.yaml`, `env.json`, `done.json`
    trackers/  wandb, TensorBoard, CSV, MLflow       cost           the cost beside end-to-end training
    report/    the page of a run or of several       intervals      how sure one can be of a score
    chance     whether a score beats guessing        out_of_memory  what to change when memory runs out
    command_line  the parser and the exit codes      train_options  the options of a training run

Start with `context` and `session`.
"""
