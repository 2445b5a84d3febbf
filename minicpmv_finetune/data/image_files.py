"""Where an image's bytes lie, and what may be decoded from them.

An address is a path, an `s3://` URI, a member of a tar shard (`shards/000.tar!cat.jpg`, the shard local or `s3://`) or
a `data:` URI that holds the image itself. A member is read at its place in the shard, in one request: nothing is
unpacked, so no name inside a shard can lead anywhere, and a shard is listed once, when the data is validated.
"""

import base64
import binascii
import io
import posixpath
import re
import tarfile
from typing import Literal
from urllib.parse import unquote

from PIL import Image, ImageOps

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

# Raster formats whose decoders are in wide use. Pillow knows more, one of which (EPS) runs another program.
FORMATS = (
    "AVIF",
    "BMP",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "TGA",
    "TIFF",
    "WEBP",
)
_MEMBER = re.compile(r"(?P<shard>.*?\.tar)!(?P<name>.*)", re.DOTALL | re.IGNORECASE)
_PACKED_SHARD = re.compile(r"\.(tar\.\w+|tgz|zip)!", re.IGNORECASE)
_ORIENTATION = 0x0112  # EXIF tag
_LONGEST_SHOWN = 120

Span = tuple[int, int]  # first byte and number of bytes
Transparency = Literal["drop", "white"]


def resolve(reference: str, folder: str) -> str:
    """The address of an image that a data file names, valid from everywhere.

    Args:
        reference: what the file says.
        folder: URI of the folder that holds the file.

    Raises:
        UserError: the name of a shard's member leads out of the shard, the shard is compressed, or it lies where
            `storage.require_allowed` lets nobody read.
    """
    if reference[:5].lower() == "data:":
        return reference
    if _PACKED_SHARD.search(reference):
        raise UserError(f"{shown(reference)}: a compressed archive cannot be read at any place; store a plain .tar.")
    member = _MEMBER.fullmatch(reference)
    if not member:
        return storage.require_allowed(storage.resolve(reference, folder))
    name = posixpath.normpath(member["name"])
    if name.startswith(("/", "..")) or name == ".":
        raise UserError(f"{shown(reference)}: leads out of the shard; name a member as the shard lists it.")
    return f"{storage.require_allowed(storage.resolve(member['shard'], folder))}!{name}"


def shard_of(address: str) -> str | None:
    """The tar shard that an image is a member of, or None."""
    if address[:5].lower() == "data:":
        return None
    member = _MEMBER.fullmatch(address)
    return member["shard"] if member else None


def list_shard(shard: str) -> dict[str, Span]:
    """Where each file of a tar shard lies in it, by address.

    Raises:
        UserError: nothing lies there, or it is no tar file.
        RetryableError: the store does not answer.
    """
    spans: dict[str, Span] = {}
    try:
        # Read from front to end, which a store answers with one stream.
        with storage.open_stream(shard) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    spans[f"{shard}!{posixpath.normpath(member.name)}"] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{shown(shard)}: not a readable tar file ({error}); write it again.") from error
    return spans


def read(address: str, span: Span | None = None) -> bytes:
    """An image's bytes, still encoded.

    Args:
        address: as `resolve` gives it.
        span: for a member of a shard, its place there.

    Raises:
        UserError: nothing lies there, or it may not be read.
        RetryableError: the store does not answer.
    """
    if address[:5].lower() == "data:":
        return _decode_data_uri(address)
    shard = shard_of(address)
    if shard is None:
        return storage.read_bytes(address)
    if span is None:
        raise UserError(f"{shown(address)}: the shard holds no such file; list its members with tar -tf.")
    return storage.read_bytes(shard, span)


def open_header(content: bytes) -> Image.Image:
    """What an image's header says, no pixel decoded.

    Raises:
        Exception: whatever a decoder raises over damaged bytes.
    """
    return Image.open(io.BytesIO(content), formats=FORMATS)


def decode(content: bytes, turn: bool = False) -> Image.Image:
    """The image, unconverted, all of its pixels decoded.

    Args:
        content: the bytes of its file.
        turn: whether to turn and mirror it as its EXIF orientation says.

    Raises:
        Exception: whatever a decoder raises over damaged bytes.
    """
    image = open_header(content)
    image.load()
    return ImageOps.exif_transpose(image) if turn else image


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation says that the image is to be turned or mirrored."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF data says nothing
        return False


def shown(address: str) -> str:
    """The address as a message shows it: a `data:` URI is as long as its image."""
    return address if len(address) <= _LONGEST_SHOWN or address[:5].lower() != "data:" else f"{address[:40]}…"


def _decode_data_uri(address: str) -> bytes:
    header, comma, body = address.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise UserError(f"{shown(address)}: only data:image/…;base64,… is read; encode the image so.")
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except binascii.Error as error:
        raise UserError(f"{shown(address)}: not valid Base64 ({error}); encode the image again.") from error


def to_rgb(image: Image.Image, transparency: Transparency) -> Image.Image:
    """Three 8-bit channels, from any mode Pillow can read."""
    if transparency == "white" and ("A" in image.getbands() or "transparency" in image.info):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")
