"""The import path of 0.3 for `sfa_dist.data.video.decode`, kept for scripts outside the package until 0.5."""

from sfa_dist.data.video.decode import Decoder, choose_decoder

__all__ = ["Decoder", "choose_decoder"]
