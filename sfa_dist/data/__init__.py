"""Tar shards in, uint8 batches out. Rank, world size and seed arrive as arguments; nothing here knows a model."""
