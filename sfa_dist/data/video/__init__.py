"""From the bytes of a video to the frames that a player shows, as uint8 (T, H, W, 3).

    decode         two decoders (decode_torchcodec, decode_pyav) behind one interface; decode_card on a GPU
    container      what a file's header claims               file_kinds     kinds of files, by their first bytes
    frame_order    which frames there are, and when          orientation    rotated and mirrored pictures
    resample       frames at another rate                    gather         collects the frames of a clip
    decode_limits  time and memory limits                    salvage        clips from the intact part of a video
    frame_source   frames one after another, also live       video          the interface of an opened video
    clip_encoding  how clips are encoded                     pixel_statistics  mean and deviation of pixels

Other packages import `decode`, `video` and `bad_sample`, and single helpers of the other modules.
Start with `decode`.
"""
