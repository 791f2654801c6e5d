"""sfa_dist: a sharded trainer for the two-stage SFA method on factorised-encoder video transformers."""

__version__ = "0.3.0"
