"""Faults on purpose: what a recipe's run promises, tried on real processes, shards and checkpoints."""
