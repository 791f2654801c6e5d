"""What a recipe costs before it runs: memory, time, disk and transfers, without a GPU.

    recipe_plan  a whole recipe          memory    of one stage: memory_trace, engine_memory, gathered_memory,
    duration     hours                             extraction_memory, decode_memory
    cost         beside end-to-end training
    search       the largest that fits   advice    what to change
    modules      stages on meta tensors  engine_setting, flops, wire, cards, dataset, feature_cache_plan, table4

Others import `recipe_plan`, `memory`, `cards` and `flops`.
Start with `recipe_plan`.
"""
