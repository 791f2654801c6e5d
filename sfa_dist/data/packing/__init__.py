"""Videos and a list of labels -> indexed shards: `sfa pack`.

    pack         the way from rows to shards     annotations/  the lists of data sets and tables of one's own
    pack_survey  what is missing or corrupt      pack_probe    one clip, looked at before it is packed
    pack_write   the tars                        pack_shared, reencode

Other packages import `pack`, `pack_probe`, `reencode` and `annotations`.
Start with `pack`.
"""
