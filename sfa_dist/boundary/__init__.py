"""What crosses the edge of the process: the project's own files, read with bounds, and text made safe to show.

disk        small files: written whole, read by size, nesting and type; what a disk says when it refuses
file_names  what a run directory holds         counted  a number of things in words
secret      passwords and signatures become `***`
plain       names from outside, for a terminal, a page, Markdown or a picture
"""
