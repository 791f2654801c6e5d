"""Plain `nn.Module`s and the loss: nothing here knows about ranks, engines or the environment.

    vivit     the factorised encoder: trunk and tail     vit, adapter      what it is made of
    frozen    the trunk as stage 2 runs it: bf16, inference mode, chunks of frames
    chunked, folding, eight_bits, compiled, footprint    its fast ways, and the memory they take
    weights   from image ViTs and files, mapped exactly  image_vit, image_function, weights_file
    loss      of clips that count

Start with `vivit`, then `frozen`.
"""
