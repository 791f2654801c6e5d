"""A recipe: one YAML file that describes one run completely. Nothing here imports torch, so login nodes can read it.

    strict_yaml  text -> nodes with their sources     source    `_base_`, `--set` and variables -> one tree
    schema       the tree -> `Recipe`, typed          stages    `Stage1`, `Stage2`, ... with their defaults
    blocks/      the blocks of a stage                messages  what is wrong, by file, line and key
    shipped      the recipes of the package          stage_names  the stages and steps of a run, in order

Others import `schema`, `blocks`, `stage_names` and `shipped`.
Start with `schema.load_recipe`.
"""
