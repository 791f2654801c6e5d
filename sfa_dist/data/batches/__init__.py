"""Samples -> augmented micro-batches, made in this process or in loader processes.

    stream   index -> sampled clips -> micro-batches    batch      the dataclass that a loader yields
    planned  loader settings, a rank's share of a plan  loader     the worker processes
    feed     batches for the trainer, workers watched   transport  tensors through shared memory
    augment, rand_augment, resizing, mixup              what happens to the pixels

Other packages import all of them but `resizing`; `features` builds its own stream on `planned`, `loader` and `mixup`.
Start with `stream`.
"""
