"""Finished weights in use: tests, predictions and timelines of long videos.

    finished_stage   finds weights by their run or by their file
    evaluate         tests them
    predictor        scores a video file, or the windows of a video
    timeline         slides windows over a long video
    timeline_output  writes a timeline's JSON file and figure
    class_scores     scores -> named classes

Start with `finished_stage`.
"""
