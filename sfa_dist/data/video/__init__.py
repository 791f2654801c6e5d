"""The bytes of a video -> the frames that a player shows, as uint8 (T, H, W, 3).

    decode         the two decoders behind one call: decode_torchcodec, decode_pyav; decode_card on a GPU
    container      what is in the file, from its header      frame_order, orientation, resample
    decode_limits  time and memory bounds                    salvage, bad_sample, gather, file_kinds
    frame_source   frames one after another

Other packages import `decode`, `video` and `bad_sample`, and single helpers of the other modules.
Start with `decode`.
"""
