"""The stages of a run: image -> stage1 -> cache -> stage2 -> test -> report.

    pipeline   the order, and what is done already      prepare        one stage from recipe to trainer
    open_data  a stage's data                           assemble       its modules and weights
    trunk_setup, trunk_fidelity                         feature_cache, cache_build, rank_sync
    sweep, sweep_scores                                 scoring        the test

Start with `pipeline.run_recipe`.
"""
