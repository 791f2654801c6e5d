"""How text from outside is shown and written down.

secret    passwords and signatures become `***`
plain     for a terminal, a line of Markdown, a page or a picture: nothing of it is a command to its reader
"""
