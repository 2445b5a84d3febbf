"""Tokens and slices of every sample, from the data's JSON and the headers of its images.

validate_data's own code checks the samples, with an image's header in place of its pixels, and preprocess's own code
tokenizes them; so the token counts are exactly preprocess's. Problems that only pixels show (a truncated file, equal
images) are found by validate_data later.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any

from PIL import Image

from minicpmv_finetune import storage
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import InspectedImage, check_record, image_addresses, image_problem
from minicpmv_finetune.data.reading import Record, local_copy, read_records
from minicpmv_finetune.data.samples import ImageRef, Reject, Sample, SampleError
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.conversation import EncodedConversation, Encoder
from minicpmv_finetune.progress import progress
from minicpmv_finetune.shards.encoding import count_slices, tokenize
from minicpmv_finetune.shards.sharing import Beginning, shareable_tokens
from minicpmv_finetune.workers import map_in_order

_HEADER_BYTES = 2**16  # read of each image; an image with a longer header is read completely
_BATCH_SIZE = 64  # samples that a process handles at once
_REMOTE_READS = 16  # images that a process reads at once from a store
_NO_LIMIT = 2**31  # tokens; no sample is too long while lengths are counted
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class SampleSize:
    """The size of one sample.

    Attributes:
        tokens: Number of tokens.
        slices: Number of slices of its images.
        patches: Number of patches in these slices.
        image_bytes: Size of its image files.
        images: Number of images.
        file: Data file that contains the sample.
        index: Position in the data file, if known.
        id: Id of the sample.
        beginning: What it may share with other samples; images are equal here if they have one address.
    """

    tokens: int
    slices: int
    patches: int
    image_bytes: int
    images: int
    file: str
    index: int | None
    id: str
    beginning: Beginning


def measure_samples(
    pattern: str, encoder: Encoder, exif_transpose: bool, rejected: Counter[str]
) -> Iterator[SampleSize]:
    """Yield the size of every accepted sample.

    Args:
        pattern: Path, URI or pattern of the data files.
        encoder: Encoder of the base model.
        exif_transpose: Whether images are rotated by their EXIF orientation.
        rejected: Counts the rejected samples by reason.
    """
    uris = storage.expand(pattern)
    paths = [local_copy(uri) for uri in uris]
    with progress("plan", sum(path.stat().st_size for path in paths), "B", unit_scale=True) as bar:
        records = (
            record for uri, path in zip(uris, paths, strict=True) for record in read_records(uri, path, bar.update)
        )
        results = map_in_order("plan", _measure_batch, _batches(records), _initialize_worker, (encoder, exif_transpose))
        for result in chain.from_iterable(results):
            if isinstance(result, SampleSize):
                yield result
            else:
                rejected[result] += 1


def _batches(records: Iterator[Record]) -> Iterator[tuple[list[Record]]]:
    while batch := list(islice(records, _BATCH_SIZE)):
        yield (batch,)


_encoder: Encoder
_exif_transpose: bool


def _initialize_worker(encoder: Encoder, exif_transpose: bool) -> None:
    global _encoder, _exif_transpose
    _encoder, _exif_transpose = encoder, exif_transpose
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _measure_batch(records: Sequence[Record]) -> list[SampleSize | str]:
    """The size of each item, or the code of the reason for which it is rejected."""
    if any(storage.is_object_uri(address) for record in records for address in image_addresses(record)):
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            return list(pool.map(_measure, records))
    return [_measure(record) for record in records]


def _measure(record: Record) -> SampleSize | str:
    image_bytes: dict[str, int] = {}
    result = check_record(record, lambda address: _inspect_header(address, image_bytes))
    if isinstance(result, Reject):
        return result.reason
    sample = Sample.model_validate_json(result.line)
    try:
        encoded = tokenize(sample, _encoder, _NO_LIMIT)
    except SampleError as error:
        return error.reason
    slice_plans = _encoder.plan(sample)
    return SampleSize(
        tokens=len(encoded.input_ids),
        slices=count_slices(sample, _encoder),
        patches=sum(
            rows * columns for number in sample.image_order for rows, columns in slice_plans[number].target_sizes
        ),
        image_bytes=sum(image_bytes.values()),
        images=len(sample.images),
        file=sample.source,
        index=sample.index,
        id=sample.id,
        beginning=_beginning(sample, encoded),
    )


def _beginning(sample: Sample, encoded: EncodedConversation) -> Beginning:
    image_token_id: Any = _encoder.tokenizer.convert_tokens_to_ids(_encoder.generation.image_token)
    tokens = shareable_tokens(encoded.input_ids, encoded.labels, image_token_id)
    images = [sample.images[number].uri for number in sample.image_order]
    shared = repr((encoded.input_ids[:tokens], images)).encode()
    return Beginning(hashlib.sha256(shared).digest() if tokens else b"", tokens)


def _inspect_header(address: str, image_bytes: dict[str, int]) -> InspectedImage | SampleError:
    """Inspect an image by its header alone, and record the size of its file."""
    try:
        head, image_bytes[address], span = _read_header(address)
    except UserError as error:
        return SampleError("image_missing", str(error))
    try:
        try:
            image = image_files.open_header(head)
        except Exception:
            image = image_files.open_header(image_files.read(address, span))
        is_rotated = _exif_transpose and image_files.has_exif_rotation(image)
        problem = image_problem(image, address)
    except Image.DecompressionBombError as error:
        return SampleError("decompression_bomb", str(error))
    except Exception as error:
        return SampleError("image_unreadable", f"{image_files.shortened(address)}: {error}")
    if problem:
        return problem
    width, height = image.size
    if is_rotated and image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:  # these orientations swap width and height
        width, height = height, width
    ref = ImageRef(uri=address, sha256="", width=width, height=height, span=span, rotated=is_rotated)
    return InspectedImage(ref, b"", ())


def _read_header(address: str) -> tuple[bytes, int, image_files.Span | None]:
    """The first bytes of an image, the size of its file, and its byte range in its archive."""
    archive = image_files.archive_of(address)
    if archive:
        span = _list_archive(archive).get(address)
        if span is None:
            raise UserError(f"{address}: the archive contains no such file; check the name.")
        return storage.read_bytes(archive, (span[0], min(span[1], _HEADER_BYTES))), span[1], span
    if image_files.is_data_uri(address):
        content = image_files.read(address)
        return content, len(content), None
    size = storage.size(address)
    return storage.read_bytes(address, (0, min(size, _HEADER_BYTES))), size, None


@lru_cache(maxsize=8)
def _list_archive(archive: str) -> image_files.Members:
    return image_files.list_archive(archive)
