"""Generated clips: textured things that move over textured grounds, with labels of their motion.

    draws     random numbers of a clip, by (seed, index)      paths     positions of things in each frame
    shapes    the pixels that a thing covers                  textures  octaves of noise, and colours
    clips     pixels and labels                               stream    endless batches for training

A clip is a pure function of seed and index. Lengths are fractions of the frame's side: (0, 0) is the top left corner
and (1, 1) the bottom right one; positions are (x, y). Start with `clips.motion_clip`.
"""
