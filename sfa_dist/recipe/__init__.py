"""A recipe: one YAML file that describes one run completely, read without torch, so that a login node can.

    strict_yaml  text -> nodes with their places      source    `_base_`, `--set` and variables -> one tree
    schema       the tree -> `Recipe`, typed          stages    `Stage1`, `Stage2`, ... with their defaults
    blocks/      the blocks of a stage                messages  what is wrong, by file, line and key
    shipped      the recipes of the package          stage_names  what a run consists of, in order

Start with `schema.load_recipe`.
"""
