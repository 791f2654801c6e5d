"""The feature cache as data: shards of the trunk's outputs, written once per view, and batches cut from them.

    feature_grid    which tubelet steps are stored, and which make a clip
    feature_slices  source videos, a few tubelet steps at a time: what the trunk takes to fill the cache
    feature_shards  the shards, their index and their manifest: writing and reading
    feature_stream  micro-batches of features, the counterpart of `batches.stream`

Other packages import all four modules. Start with `feature_stream`.
"""
