"""The feature cache as data: shards of the trunk's outputs, and clips cut from them.

    feature_shards  writing and reading     feature_grid    which stored steps make a clip
    feature_slices  one clip's slices       feature_stream  the twin of `batches.stream`

Other packages import all four modules.
Start with `feature_stream`.
"""
