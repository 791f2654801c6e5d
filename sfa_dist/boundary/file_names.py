"""The names of the files in a run directory, which users, scripts and later starts rely on."""

# Of a run.
RECIPE = "recipe.yaml"  # The resolved recipe.
ENVIRONMENT = "env.json"  # Versions, hosts and devices of the last start.
LOG = "log.jsonl"
CONSOLE = "console.log"
RESULT = "result.json"
REPORT_TEXT, REPORT_PAGE = "report.md", "report.html"
ATTEMPTS = "attempts.json"  # How earlier starts ended.
QUARANTINE = "quarantine.jsonl"  # Bad samples.
LOCK = "lock"

# Of a stage.
DONE = "done.json"  # Inputs and results of a finished stage.
WEIGHTS = "weights.safetensors"  # Final weights of a finished stage.
CHECKPOINTS = "checkpoints"
CALIBRATION = "calibration.json"  # Of stage 2: how long end-to-end steps take, or why they were not timed.

# Of the test.
CLASSES = "classes.json"  # Scores of each class.
