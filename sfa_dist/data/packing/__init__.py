"""Videos and a list of labels -> indexed shards: `sfa pack`.

    pack         from a list to shards          annotations/  lists of data sets, and the user's own tables and folders
    pack_survey  which clips can be packed      pack_probe    one clip, checked before it is packed
    pack_write   the tar files                  reencode      smaller frames, more key frames, parts of long videos
    pack_shared  clips of several splits        pack_settings

Other packages import `pack`, `pack_settings`, `pack_probe`, `reencode` and `annotations`.
Start with `pack`.
"""
