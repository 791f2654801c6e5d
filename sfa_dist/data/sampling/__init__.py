"""The order of samples, and the frames of each clip: pure functions of seed, epoch, position and sample.

    sample_plan    the order of an epoch, and each rank's share of it
    clip_sampling  the frames of a clip            randomness  numbers keyed by (seed, epoch, sample)

All of it may be imported by other packages; it imports no other package of the project.
Start with `sample_plan`.
"""
