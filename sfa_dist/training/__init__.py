"""The training loop of one stage, from batches to a trained tail.

    trainer    the loop: batch -> loss -> step -> log -> save      schedule     the learning rate of a step
    progress   where the loop stands, as a checkpoint holds it     seeds        the random numbers of a step
    evaluation views -> scores; metrics counts them                train_log    the lines of log.jsonl
    bad_clips, non_finite, trunk_ahead, prediction_file, loader_share

Start with `trainer.Trainer`.
"""
