"""A recipe: one YAML file that describes one run completely, read without torch, so that a login node can.

    strict_yaml  text -> nodes with their places      source    `_base_`, `--set` and variables -> one tree
    schema       the tree -> `Recipe`, typed          stages    `Stage1`, `Stage2`, ... with their defaults
    blocks/      the blocks of a stage                messages  what is wrong, by file, line and key
    shipped      the recipes that come with the package

Start with `schema.load_recipe`.
"""
