"""What shards and steps the trainable module.

    engine       the protocol            make_engine  the recipe's choice
    zero         DeepSpeed's ZeRO        zero_config  its config
    fsdp         FSDP2                   exact        the same sum in the same order on any number of ranks
    optimizers   AdamW and SGD           activation   keep, recompute or offload activations
    offload      trunk features in host memory

Start with `engine`.
"""
