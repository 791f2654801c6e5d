"""Clips that are generated as they are needed: textured things that move over textured grounds, and how they move.

    draws     what is drawn for a clip, by (seed, index)      paths     where things are in each frame
    shapes    what a thing covers                             textures  octaves of noise
    clips     the pixels and the labels                       stream    blocks of clips for a training

Two clips with the same seed and index are the same clip. Lengths are shares of the frame's side: (0, 0) is the top left
corner and (1, 1) the bottom right one; positions are (x, y). Start with `clips.motion_clip`.
"""
