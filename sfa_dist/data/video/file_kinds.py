"""The kind of a file, by its first bytes and not by its name.

Names mislead: phones name an mp4 .m4v or .3gp, and a transport stream is often named .mp4. The kinds that are read are
those that shards may hold. For the others, messages name the kind and the command that converts the file to mp4.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from sfa_dist.data.shards.shard_walk import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sfa_dist.data.video.container import is_known

HEAD_BYTES = 4096  # enough to identify the kind
READ = "mp4, mov, avi, mkv, webm, png or jpg"
# Suffixes of files that hold frames, readable or not: in a list or a folder they count as samples.
FRAME_SUFFIXES = frozenset(
    {
        *VIDEO_SUFFIXES,
        *IMAGE_SUFFIXES,
        *("jpeg", "m4v", "3gp", "3g2", "qt", "f4v", "divx", "mk3d", "mjpg", "mjpeg"),
        *("ts", "mts", "m2ts", "mpg", "mpeg", "mpe", "m1v", "m2v", "mp2", "vob", "dat", "flv", "wmv", "asf", "gif"),
        *("ogv", "ogg", "ogm", "rm", "rmvb", "mxf", "y4m", "yuv", "h264", "264", "hevc", "h265", "265", "ivf", "dv"),
        *("webp", "bmp", "tif", "tiff", "avif", "heic", "apng"),
    }
)
# (first sync byte, packet length) of a transport stream: plain packets, and packets after 4 bytes of time each.
_TS_PACKETS = ((0, 188), (4, 192))
_PICTURES = ("WebP", "BMP", "TIFF")
_STARTS = (
    (b"\x00\x00\x01\xba", "an MPEG program stream (mpg, vob)"),
    (b"\x00\x00\x01\xb3", "an MPEG video stream (m1v, m2v)"),
    (b"\x00\x00\x00\x01", "a raw H.264 or HEVC stream"),
    (b"\x00\x00\x01", "a raw H.264 or HEVC stream"),
    (b"FLV\x01", "a Flash video (flv)"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file (wmv, asf)"),
    (b"GIF8", "a GIF animation"),
    (b"OggS", "an Ogg file"),
    (b".RMF", "a RealMedia file"),
    (b"YUV4MPEG2", "a raw video (y4m)"),
    (b"DKIF", "an IVF file"),
    (b"\x06\x0e\x2b\x34", "an MXF file"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
)


def suffix_of(path: Path) -> str:
    """A file's suffix in lower case and without the dot; `jpeg` is `jpg`."""
    suffix = path.suffix.lower().removeprefix(".")
    return "jpg" if suffix == "jpeg" else suffix


def stored_suffix(head: bytes, name: str) -> str:
    """The suffix in shards for a file that starts with `head`; "" if its kind is not read.

    `name` is the file's own suffix, which is kept if its kind has several (mp4 and mov, mkv and webm).
    """
    if not is_known(head):
        return ""
    if head.startswith(b"\x89PNG"):
        return "png"
    if head.startswith(b"\xff\xd8"):
        return "jpg"
    if head.startswith(b"RIFF"):
        return "avi"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return name if name in ("mkv", "webm") else "mkv"
    return name if name in ("mp4", "mov") else "mp4"


def foreign_kind(head: bytes) -> str:
    """The kind of a file that is not read, for messages; "" if it is unknown."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP picture"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "a BMP picture"
    if any(head[start : start + 1] == b"\x47" == head[start + step : start + step + 1] for start, step in _TS_PACKETS):
        return "an MPEG transport stream (ts, m2ts)"
    return next((kind for start, kind in _STARTS if head.startswith(start)), "")


def unreadable(head: bytes, name: str = "FILE") -> str:
    """Why a file whose kind is not read is refused, with the command that converts it. `name` is its path."""
    if not head:
        return "empty file"
    reason = f"not a {READ} file"
    kind = foreign_kind(head)
    if not kind:
        return reason
    if any(word in kind for word in _PICTURES):
        return f"{reason} but {kind}: save it as png or jpg"
    return f"{reason} but {kind}; this makes an mp4 to put in its place: {to_mp4(name)}"


def to_mp4(name: str) -> str:
    """The command that converts a video to mp4, frame for frame, close to the source's quality."""
    target = shlex.quote(str(Path(name).with_suffix(".mp4"))) if Path(name).suffix.lower() != ".mp4" else "OUT.mp4"
    even = "'pad=ceil(iw/2)*2:ceil(ih/2)*2'"
    options = f"-map 0:v:0 -fps_mode passthrough -vf {even} -c:v libx264 -crf 18 -pix_fmt yuv420p"
    return f"ffmpeg -i {shlex.quote(name)} {options} {target}"
