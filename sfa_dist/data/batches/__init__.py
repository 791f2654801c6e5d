"""Samples -> augmented batches, in this process or in loader processes.

    stream   plan -> sample -> frames -> augmented clip      loader     processes that do it
    feed     batches to the trainer, watched                 transport  tensors between processes
    augment, rand_augment, mixup, resizing                   what becomes of a clip

Other packages import `stream`, `loader`, `feed`, `augment` and `rand_augment`.
Start with `stream`.
"""
