"""The commands of `sfa`, one thin module each; no other package of sfa_dist imports from here.

A command's parser is built without torch; a command imports what it needs when it runs. `plan`, `predict`, `show` and
`submit` have further modules for their work and output, `check_learning` has those named `learning_*`, and
`motion_prior` has `motion_training`.
Start with `cli`.
"""
