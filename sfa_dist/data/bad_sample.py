"""The import path of 0.3 for `sfa_dist.data.video.bad_sample`, kept for scripts outside the package until 0.5."""

from sfa_dist.data.video.bad_sample import BadSample

__all__ = ["BadSample"]
