"""WebDataset tar shards: their names, their index, their bytes, from disk, pipe, HTTP or S3.

    shard_names  patterns -> shards               shard_walk, shard_index, index_file, index_columns  the index
    reader       a sample by shard and offset     remote, fetch, retry, answers, remote_index         other machines
    shard_cache  whole shards on a local disk     quarantine, braces, subset

Other packages import `shard_names`, `shard_index`, `shard_walk`, `index_file`, `index_columns`, `reader`, `quarantine`
and `subset`; the other modules serve these.
Start with `reader`.
"""
