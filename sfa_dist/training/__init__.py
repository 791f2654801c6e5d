"""The training loop of one stage, from batches to trained parameters, and the evaluation of a model.

    trainer       batch -> loss -> step -> log -> save       step             what the ranks exchange in a step
    model_inputs  clips, or the frozen trunk's features      trunk_ahead      the trunk one micro-batch ahead
    schedule      the learning rate of a step                seeds            the random numbers of a step
    progress      the counters that a checkpoint holds       train_log        log lines, and loader_share's advice
    evaluation    views -> scores, which metrics counts      prediction_file  the scores of each clip in a file
    bad_clips     clips that cannot be read                  non_finite       gradients, scores and saves refused

Other packages import any of these but `step`, `train_log` and `loader_share`. Start with `trainer.Trainer`.
"""
