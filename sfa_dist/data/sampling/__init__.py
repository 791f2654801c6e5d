"""Which clip comes when, and which frames of it: pure functions of seed, epoch, position and key.

    sample_plan    the order of an epoch, and each rank's part of it
    clip_sampling  the frames of a clip            randomness  numbers keyed by (seed, epoch, sample)

Start with `sample_plan`.
"""
