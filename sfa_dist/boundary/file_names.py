"""File names in a run directory that users, scripts and resumed runs rely on."""

RECIPE = "recipe.yaml"  # The resolved recipe.
WEIGHTS = "weights.safetensors"  # The weights of a finished stage.
