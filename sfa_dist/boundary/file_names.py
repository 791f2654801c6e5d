"""The names of a run directory's files, which users, scripts and later starts rely on."""

RECIPE = "recipe.yaml"  # The resolved recipe.
WEIGHTS = "weights.safetensors"  # Of a stage that is done.
