"""Plain `nn.Module`s and the loss: nothing here knows about ranks, engines or the environment.

    vivit     the factorised encoder: trunk and tail     vit, adapter      its parts
    frozen    the trunk as stage 2 runs it: bf16, inference mode, chunks of frames
    chunked, folding, eight_bits, compiled, footprint    how the trunk is made fast, and the memory it takes
    still     the image of a clip that `model.subtract` takes from its pixels
    weights   loading files, image ViTs and stage 1      image_vit, image_function, weights_file
    assembly  a stage's modules as its recipe describes them
    loss      of a clip, and of a batch

Start with `vivit`, then `frozen`.
"""
