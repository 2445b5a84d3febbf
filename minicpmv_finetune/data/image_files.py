"""Addresses of images, and how the bytes at an address are read and decoded.

An address is a path, an `s3://` URI, a member of a tar archive (`archives/000.tar!cat.jpg`, the archive local or
`s3://`) or a `data:` URI that contains the image itself. A member is read by its byte range in the archive, in one
request: nothing is unpacked, so no member's name can lead to another place, and an archive is listed once, when the
data is validated.
"""

import base64
import binascii
import codecs
import hashlib
import io
import posixpath
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from typing import Literal
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

# Raster formats whose decoders are in wide use. Pillow supports more, one of which (EPS) runs another program.
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
_MEMBER = re.compile(r"(?P<archive>.*?\.tar)!(?P<name>.*)", re.DOTALL | re.IGNORECASE)
_COMPRESSED_ARCHIVE = re.compile(r"\.(tar\.\w+|tgz|zip)!", re.IGNORECASE)
_ORIENTATION = 0x0112  # EXIF tag
_LONGEST_IN_MESSAGES = 120  # characters of a data: URI

Span = tuple[int, int]  # first byte and number of bytes
Transparency = Literal["drop", "white"]


def resolve(reference: str, folder: str) -> str:
    """The address of an image that a data file names, valid from everywhere.

    Args:
        reference: The name as written in the data file.
        folder: URI of the folder that contains the data file.

    Raises:
        UserError: The name leads out of its archive, the archive is compressed, or the image is at a place that
            `storage.require_allowed` does not allow.
    """
    if is_data_uri(reference):
        return reference
    if _COMPRESSED_ARCHIVE.search(reference):
        raise UserError(
            f"{shortened(reference)}: a member of a compressed archive cannot be read without unpacking it; store a "
            "plain .tar."
        )
    member = _MEMBER.fullmatch(reference)
    if not member:
        return storage.require_allowed(storage.resolve(reference, folder))
    name = posixpath.normpath(member["name"])
    if name.startswith(("/", "..")) or name == ".":
        raise UserError(f"{shortened(reference)}: leads out of the archive; name a member as the archive lists it.")
    return f"{storage.require_allowed(storage.resolve(member['archive'], folder))}!{name}"


def is_data_uri(address: str) -> bool:
    """Whether the address is a `data:` URI, which contains the image itself."""
    return address[:5].lower() == "data:"


def archive_of(address: str) -> str | None:
    """The tar archive that contains the image, or None."""
    if is_data_uri(address):
        return None
    member = _MEMBER.fullmatch(address)
    return member["archive"] if member else None


class Members:
    """The byte ranges of an archive's files, by address: 32 bytes a file, because archives have a million and more."""

    def __init__(self, files: Iterable[tuple[str, Span]]) -> None:
        names, spans = bytearray(), array("q")
        for address, span in files:
            names += _digest(address)
            spans.extend(span)
        digests = np.frombuffer(names, np.uint64).reshape(-1, 2)
        order = np.lexsort(digests.T[::-1])  # stable: of files with one name the last is the one that tar unpacks
        self._digests, self._spans = digests[order], np.asarray(spans).reshape(-1, 2)[order]

    def get(self, address: str) -> Span | None:
        """The byte range of a file, or None if there is none with this address."""
        first, second = np.frombuffer(_digest(address), np.uint64)
        start, end = (int(self._digests[:, 0].searchsorted(first, side)) for side in ("left", "right"))
        place = start + int(self._digests[start:end, 1].searchsorted(second, "right")) - 1
        if place < start or self._digests[place, 1] != second:
            return None
        offset, size = self._spans[place].tolist()
        return offset, size


def _digest(address: str) -> bytes:
    return hashlib.blake2b(address.encode(errors="surrogateescape"), digest_size=16).digest()


def list_archive(archive: str) -> Members:
    """The byte range of each file in a tar archive, by the file's address.

    Raises:
        UserError: There is no file at the address, or it is not a tar file.
        RetryableError: The store does not answer.
    """
    try:
        # Read from front to end, which a store answers with one stream.
        with storage.open_stream(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
            return Members(_spans(archive, members))
    except tarfile.TarError as error:
        raise UserError(f"{shortened(archive)}: not a readable tar file ({error}); write it again.") from error


def _spans(archive: str, members: tarfile.TarFile) -> Iterator[tuple[str, Span]]:
    while (member := members.next()) is not None:
        members.members.clear()  # type: ignore[attr-defined]  # of each, tarfile would keep a kilobyte
        if member.isreg() and not member.issparse():
            yield f"{archive}!{posixpath.normpath(member.name)}", (member.offset_data, member.size)


def read(address: str, span: Span | None = None) -> bytes:
    """The bytes of an image file, still encoded.

    Args:
        address: An address as `resolve` returns it.
        span: The byte range in the archive, for a member of one.

    Raises:
        UserError: There is no file at the address, or access is denied.
        RetryableError: The store does not answer.
    """
    if is_data_uri(address):
        return _decode_data_uri(address)
    archive = archive_of(address)
    if archive is None:
        return storage.read_bytes(address)
    if span is None:
        raise UserError(f"{shortened(address)}: the archive contains no such file; list its members with tar -tf.")
    return storage.read_bytes(archive, span)


def open_header(content: bytes) -> Image.Image:
    """Parse the header of an image file without decoding a pixel.

    Raises:
        Exception: Any error that a decoder raises for damaged bytes.
    """
    return Image.open(io.BytesIO(content), formats=FORMATS)


def decode(content: bytes, rotate: bool = False) -> Image.Image:
    """Decode all pixels of an image file, without converting its mode.

    Args:
        content: The bytes of the file.
        rotate: Whether to rotate and mirror the image as its EXIF orientation says.

    Raises:
        Exception: Any error that a decoder raises for damaged bytes.
    """
    image = open_header(content)
    image.load()
    return ImageOps.exif_transpose(image) if rotate else image


# What users have in place of an image: the first bytes, from some position, what they are, and the remedy.
_OTHER_CONTENTS = (
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "fetch it with git lfs pull"),
    (0, b"/annex/objects/", "a git-annex pointer", "fetch it with git annex get"),
    (0, b"<!doctype html", "a web page", "download it again"),
    (0, b"<html", "a web page", "download it again"),
    (0, b"<svg", "an SVG drawing", "convert it to PNG"),
    (0, b"<?xml", "an XML document", "replace it by an image, such as a PNG"),
    (0, b"%pdf", "a PDF", "convert its pages to PNG"),
    (0, b"%!ps", "PostScript", "convert it to PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript", "convert it to PNG"),
    (0, b"8bps", "a Photoshop document", "convert it to PNG"),
    (0, b"pk\x03\x04", "a ZIP archive", "unpack it"),
    (0, b"par1", "a Parquet table", "convert it with minicpmv-finetune import-data"),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it"),
    (0, b"data:image/", "text: a data: URI", "write the URI itself in place of the file's name"),
    (0, b"\xff\x0a", "JPEG XL", "convert it to PNG"),
    (4, b"jxl ", "JPEG XL", "convert it to PNG"),
    (128, b"dicm", "a DICOM image", "convert it to PNG"),
    *((8, brand, "HEIC, Apple's photo format", "convert it to JPEG") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftyp", "a video, or an image in a format of videos", "convert it to JPEG"),
)
_BYTES_THAT_TELL = 256
_CHARACTERS_SHOWN = 60
_ADDRESS_IN_MEMORY = re.compile(r" object at 0x[0-9a-f]+")


def explain_content(content: bytes) -> str | None:
    """What a file is that is not what it should be, and what to do, by its first bytes; None if they do not tell."""
    start = content[:_BYTES_THAT_TELL].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for position, signature, kind, remedy in _OTHER_CONTENTS:
        if start.startswith(signature, position):
            return f"{kind}; {remedy}"
    return None


def explain_unreadable(content: bytes, error: Exception) -> str:
    """Why bytes are not a readable image and what to do, the same in each run, as the end of a sentence.

    Args:
        content: The bytes of the file.
        error: The decoder's error.
    """
    if not content:
        return "not a readable image: the file is empty; write the image again."
    if found := explain_content(content):
        return f"not a readable image: it is {found}."
    if beginning := _beginning_of_text(content):
        return f"not a readable image: it is text, which begins with {beginning!r}; download the image again."
    if isinstance(error, UnidentifiedImageError):
        return (
            f"not a readable image: its first bytes {content[:12]!r} are of no known format; convert it to PNG or JPEG."
        )
    reason = _ADDRESS_IN_MEMORY.sub("", f"{type(error).__name__}: {error}")
    return f"not a readable image ({reason:.200}); replace it."


def _beginning_of_text(content: bytes) -> str:
    """The first characters of a text; empty if the bytes are no text."""
    try:
        # An incremental decoder accepts that the last character is cut.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content[:_BYTES_THAT_TELL])
    except UnicodeDecodeError:
        return ""
    is_text = all(character.isprintable() or character.isspace() for character in text)
    return " ".join(text.split())[:_CHARACTERS_SHOWN] if is_text else ""


def has_exif_rotation(image: Image.Image) -> bool:
    """Whether the EXIF orientation says that the image is to be rotated or mirrored, which Pillow has not done itself.

    Pillow rotates TIFF images, and no others, while it decodes them.
    """
    if image.format == "TIFF":
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged EXIF data gives no orientation
        return False


def shortened(address: str) -> str:
    """The address as messages print it; a `data:` URI is cut because it is as long as its image."""
    return address if len(address) <= _LONGEST_IN_MESSAGES or not is_data_uri(address) else f"{address[:40]}…"


def _decode_data_uri(address: str) -> bytes:
    header, comma, body = address.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise UserError(f"{shortened(address)}: only data:image/…;base64,… can be read; encode the image this way.")
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except binascii.Error as error:
        raise UserError(f"{shortened(address)}: not valid Base64 ({error}); encode the image again.") from error


def to_rgb(image: Image.Image, transparency: Transparency) -> Image.Image:
    """Convert an image of any mode that Pillow can read to three 8-bit channels.

    Args:
        image: The decoded image.
        transparency: `drop` ignores the alpha channel; `white` lays the image over white.

    Returns:
        The image itself if it has these channels already.
    """
    if transparency == "white" and ("A" in image.getbands() or "transparency" in image.info):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
