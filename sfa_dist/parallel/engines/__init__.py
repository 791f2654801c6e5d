"""What shards and steps the trainable module.

    engine       the protocol            make_engine  the recipe's choice
    zero         DeepSpeed's ZeRO        zero_config  its config
    fsdp         FSDP2                   exact        one sum in one order, for any number of ranks
    optimizers, activation, offload

Start with `engine`.
"""
