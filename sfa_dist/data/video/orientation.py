"""How a stored picture is rotated and mirrored before it is shown.

A container's header (mp4, mov, mkv), a stream (the SEI of H.264 and HEVC) or a picture (EXIF) may set it. FFmpeg
reports all of them with the decoded frame, as one display matrix, which is applied here as `ffmpeg` and players do.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from sfa_dist.data.video.bad_sample import BadSample

_TOLERANCE = 0.5  # degrees from a quarter turn that players round away


class Orientation(NamedTuple):
    """Counter-clockwise quarter turns (0 to 3), then whether left and right are swapped."""

    turns: int = 0
    mirrored: bool = False

    @property
    def swaps_sides(self) -> bool:
        """Whether height becomes width."""
        return self.turns % 2 == 1

    def applied(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A stored picture, uint8 (H, W, 3), as it is shown; contiguous."""
        turned = np.rot90(picture, self.turns)
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)


UPRIGHT = Orientation()
_EXIF_TAG = 0x0112  # Orientation, of eight values
_EXIF = {
    number: Orientation(turns, mirrored)
    for number, (turns, mirrored) in enumerate(
        [(0, False), (0, True), (2, False), (2, True), (3, True), (3, False), (1, True), (1, False)], 1
    )
}


def orientation_of(matrix: Sequence[int] | None) -> Orientation:
    """The orientation that a display matrix (nine 16.16 numbers, by rows; None: no matrix) stands for.

    The rules are those of ffmpeg's autorotate: the angle of the first row, then the signs that show mirroring. A matrix
    without an angle (a row of zeros) and any scale or shift change nothing. Raises BadSample for an angle that is not
    a multiple of 90 degrees, which players show with black corners.
    """
    if matrix is None:
        return UPRIGHT
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return UPRIGHT
    angle = math.degrees(math.atan2(matrix[1] / down, matrix[0] / across)) % 360  # clockwise
    quarter = round(angle / 90) % 4
    if abs((angle - 90 * quarter + 180) % 360 - 180) > _TOLERANCE:
        raise BadSample(
            f"its header turns the picture by {angle:.0f} degrees, which is not a multiple of 90: encode it again "
            "(ffmpeg -i IN OUT)"
        )
    if quarter == 0:
        return Orientation(2, True) if matrix[4] < 0 else UPRIGHT
    if quarter == 1:
        return Orientation(3, matrix[3] > 0)
    if quarter == 3:
        return Orientation(1, matrix[3] < 0)
    return Orientation(2, False) if matrix[4] < 0 else Orientation(0, True)


def exif_orientation(picture: bytes) -> Orientation | None:
    """The orientation in the EXIF of a jpeg or png; None if it has none."""
    try:
        with Image.open(io.BytesIO(picture), formats=("JPEG", "PNG")) as image:
            return _EXIF.get(image.getexif().get(_EXIF_TAG, 0))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None  # not a picture that PIL reads: the orientation comes from the decoded frame
