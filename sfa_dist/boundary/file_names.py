"""The names of a run directory's files, which users, scripts and later starts rely on."""

# Of the run.
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
DONE = "done.json"  # What a stage that is done was made from, and what came out.
WEIGHTS = "weights.safetensors"  # Of a stage that is done.
CHECKPOINTS = "checkpoints"

# Of the test.
CLASSES = "classes.json"  # Scores of each class.
