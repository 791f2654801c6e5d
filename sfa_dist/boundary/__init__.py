"""The edge of the process: the project's own files, read within bounds, and text made safe to show.

    disk        small files: replaced atomically, read within bounds of size, nesting and type; disk errors in words
    file_names  the names of the files in a run directory
    counted     a number with its noun
    secret      passwords and signatures become `***`
    plain       text from outside, escaped for a terminal, a web page, Markdown or a figure

All other packages may import these modules; this package imports none of them. Start with `disk`.
"""
