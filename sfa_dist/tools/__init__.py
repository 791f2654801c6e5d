"""The commands of `sfa`, one module each, thin over the rest of the package; `cli` is the way in.

A command's parser is built without torch; what it needs is imported when it runs. `pack`, `plan`, `predict` and `show`
have a second module for what they print or draw, and `check_learning` those named `learning_*`.
"""
