"""The stages of a run: image -> stage1 -> cache -> stage2 -> test -> report.

    pipeline       the order of the stages, and training one  prepare         a stage made ready: data, modules, engine
    open_data      a stage's shards and streams               notices         what does not fit its clips
    assemble       its modules and weights                    trunk_setup     device, chunks, compile, activations
    feature_cache  what a cache depends on                    cache_build     the stage `cache`, with rank_sync
    scoring        the stage `test`                           trunk_fidelity  8-bit features compared with bf16
    sweep          many stage-2 members on one cache          sweep_scores    their test in one pass
    calibrate      end-to-end steps timed, for the cost ratio
    finished       whether a run directory has all of it

`train.py` imports `pipeline`; `inference` and `tools` import the modules of a single stage.
Start with `pipeline.run_recipe`.
"""
