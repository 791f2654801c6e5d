"""WebDataset tar shards: their names, their index and their bytes, from disk, a pipe, HTTP or S3.

    shard_names  from patterns to shards          braces         brace patterns
    reader       a sample by shard and offset     shard_walk     what is in a tar
    shard_index  the table of samples             index_file, index_columns  index.json and its arrays
    remote       ranges and files from a server   fetch, answers, retry      whole shards, limits, retries
    shard_cache  whole shards on a local disk     remote_index   the index of remote shards
    quarantine   clips that crash a process       subset         subsets and relabelled copies

Other packages import `shard_names`, `shard_index`, `shard_walk`, `index_file`, `index_columns`, `reader`, `quarantine`
and `subset`; the other modules serve these.
Start with `reader`.
"""
