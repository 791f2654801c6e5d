"""From videos and labels to uint8 batches. Rank, world size and seed are arguments; nothing here imports a model.

    packing   videos and labels -> shards            shards    tar shards, their index, local and remote
    video     bytes -> frames                        sampling  which sample and which frames, and when
    batches   samples -> augmented batches           features  batches from a cache of the trunk's outputs
    motion    generated clips

Other packages import from the sub-packages; `decode` and `bad_sample` here only keep import paths of 0.3.
Start with `batches.stream`, which lists the steps in order.
"""
