"""Finished weights in use: tests, predictions and timelines of long videos.

    finished_stage  weights by a run or by their file      evaluate   a test of them
    predictor       top-5 of a video                       timeline   a long video, window by window
    class_scores    scores -> named classes                timeline_output

Start with `finished_stage`.
"""
