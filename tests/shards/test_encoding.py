"""Encoded samples equal those in a golden file, so that no change of the encoding goes unnoticed.

The golden file belongs to one `ENCODING_VERSION`, which is part of the key of the shard cache. Images are computed with
integers and stored as PNG, and the tiny checkpoints are the same on every machine, so the file does not depend on the
machine. `python -m tests.shards.test_encoding` writes the golden file.
"""

import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minicpmv_finetune.components.preprocess.shard_tasks import LIBRARIES
from minicpmv_finetune.data.samples import ImageRef, Sample, Turn
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.tiny_checkpoint import VERSIONS, write_tiny_checkpoint
from minicpmv_finetune.pipelines.demo import DEMO_CORPUS
from minicpmv_finetune.shards.codecs import CODECS, Codec, restore_slices
from minicpmv_finetune.shards.encoding import ENCODING_VERSION, store, tokenize

GOLDEN = Path(__file__).with_name("encoded_samples.json")
COMMAND = "python -m tests.shards.test_encoding"
ORIENTATION = 0x0112  # EXIF tag
MAX_SLICE_NUMS = 4
MODEL_MAX_LENGTH = 4096

Encoding = dict[str, Any]  # input_ids, labels, slices and layout


def png(width: int, height: int, mode: str = "RGB", orientation: int = 1) -> bytes:
    """An image whose pixels follow from their positions alone."""
    channels = len(mode)
    numbers = np.arange(width * height * channels, dtype=np.int64)
    pixels = ((numbers * 2_654_435_761 >> 9) % 256 // 2 + numbers // channels % width % 128).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.frombytes(mode, (width, height), pixels.tobytes()).save(file, "PNG", exif=exif)
    return file.getvalue()


def image_ref(width: int, height: int, rotated: bool = False) -> ImageRef:
    return ImageRef(uri="", sha256="", width=width, height=height, rotated=rotated)


def conversation(*texts: str | Sequence[str | int]) -> tuple[Turn, ...]:
    """Turns of user and assistant; an integer stands for an image."""
    return tuple(
        Turn(role="assistant" if number % 2 else "user", parts=(text,) if isinstance(text, str) else tuple(text))
        for number, text in enumerate(texts)
    )


def sample(name: str, turns: tuple[Turn, ...], images: tuple[ImageRef, ...] = ()) -> Sample:
    return Sample(id=name, images=images, turns=turns, source="golden")


# Each sample with the files of its images.
SAMPLES: dict[str, tuple[Sample, list[bytes]]] = {
    "text only": (sample("text only", conversation("Which digit is the largest?", "The digit is 9.")), []),
    "one image": (
        sample("one image", conversation([0, "\nWhich digit?"], "The digit is 7."), (image_ref(250, 170),)),
        [png(250, 170)],
    ),
    "several images": (  # shown in another order than listed; one has an alpha channel, one is rotated
        sample(
            "several images",
            conversation(["Compare ", 2, "\n", 0, " and ", 1, "."], "1, 2 and 3."),
            (image_ref(40, 56), image_ref(120, 90), image_ref(80, 130, rotated=True)),
        ),
        [png(40, 56, "L"), png(120, 90, "RGBA"), png(130, 80, orientation=6)],
    ),
    "several turns": (
        sample(
            "several turns",
            (
                Turn(role="system", parts=("Be brief.",)),
                *conversation([0, "\nWhich digit?"], "The digit is 3.", ["And now?\n", 1], "The digit is\n\n8 – or 9."),
            ),
            (image_ref(112, 112), image_ref(60, 300)),
        ),
        [png(112, 112), png(60, 300)],
    ),
    "line breaks first": (  # in 2.6 and 4.0, a line break and another one are one token
        sample("line breaks first", conversation("Which?", "\n\n 7.", "And now?", " \r\nThe digit is\n\n8.")),
        [],
    ),
    "reasoning": (
        sample("reasoning", conversation("Which digit?", " <think>\nIt has a gap.\n</think>\n\nThe digit is 3.")),
        [],
    ),
    "an answer without loss": (
        sample(
            "an answer without loss",
            tuple(
                turn.model_copy(update={"loss": turn.text != "The digit is 4."})
                for turn in conversation("Which digit?", "The digit is 4.", "Sure?", "The digit is 5.")
            ),
        ),
        [],
    ),
}


def encode(name: str, encoder: Encoder, codec: Codec) -> Encoding:
    example, files = SAMPLES[name]
    encoded = tokenize(example, encoder, MODEL_MAX_LENGTH)
    row = store(example, encoded, files, encoder, codec)
    parts = [memoryview(part) for part in row.images.parts]
    slices = restore_slices(parts, row.images.layout, codec, encoder.slicing)
    return {
        "input_ids": list(row.input_ids),
        "labels": list(row.labels),
        "slices": [f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}" for pixels in slices],
        "layout": list(row.images.layout),
    }


def golden_entry(name: str, encoder: Encoder) -> Encoding:
    """An entry of the golden file: all codecs restore the same slices, but only `source` has another layout."""
    source, raw = (encode(name, encoder, codec) for codec in ("source", "raw"))
    return {**source, "layout": {"source": source["layout"], "slices": raw["layout"]}}


def expected(entry: Encoding, codec: Codec) -> Encoding:
    """The encoding with one codec, from an entry of the golden file."""
    return {**entry, "layout": entry["layout"]["source" if codec == "source" else "slices"]}


def environment(checkpoints: Mapping[str, Path]) -> dict[str, Any]:
    """What the golden file depends on besides the encoding: versions of libraries, and the tiny tokenizers."""
    tokenizers = {
        version: hashlib.sha256((checkpoint / "tokenizer.json").read_bytes()).hexdigest()
        for version, checkpoint in checkpoints.items()
    }
    return {"libraries": {name: library_version(name) for name in LIBRARIES}, "tokenizers": tokenizers}


def read_golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.read_text())
    return content


def differences(found: Encoding, golden: Encoding) -> Iterator[str]:
    return (field for field in golden if found[field] != golden[field])


def test_the_golden_file_belongs_to_the_encoding_version() -> None:
    assert read_golden()["encoding_version"] == ENCODING_VERSION, f"write the golden file again with `{COMMAND}`"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("version", VERSIONS)
def test_encoded_samples_equal_the_golden_file(version: str, codec: Codec, tiny: Callable[[str], Path]) -> None:
    golden = read_golden()
    encoder = Encoder.from_checkpoint(tiny(version), MAX_SLICE_NUMS)
    assert set(golden["samples"][version]) == set(SAMPLES), f"write the golden file again with `{COMMAND}`"
    for name, entry in golden["samples"][version].items():
        fields = list(differences(encode(name, encoder, codec), expected(entry, codec)))
        assert not fields, (
            f"MiniCPM-V {version}, {codec}, sample {name!r}: {' and '.join(fields)} differ from {GOLDEN.name}; "
            f"{remedy(golden['environment'], environment({version: tiny(version)}))} write the golden file again with "
            f"`{COMMAND}`"
        )


def remedy(golden: dict[str, Any], found: dict[str, Any]) -> str:
    if golden["libraries"] != found["libraries"] or not found["tokenizers"].items() <= golden["tokenizers"].items():
        return "versions of libraries or the tiny checkpoints changed; if nothing else did,"
    return "raise ENCODING_VERSION in minicpmv_finetune/shards/encoding.py and"


def write_golden() -> None:
    """Write the golden file of the current encoding version.

    It refuses to replace the encoding of a sample in the file of the same version, unless libraries or tiny checkpoints
    changed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        checkpoints = {
            version: write_tiny_checkpoint(Path(temporary) / version, version, corpus=DEMO_CORPUS)
            for version in VERSIONS
        }
        encoders = {version: Encoder.from_checkpoint(path, MAX_SLICE_NUMS) for version, path in checkpoints.items()}
        samples = {
            version: {name: golden_entry(name, encoder) for name in SAMPLES} for version, encoder in encoders.items()
        }
        found_in = environment(checkpoints)
    if GOLDEN.is_file():
        old = read_golden()
        if (old["encoding_version"], old["environment"]) == (ENCODING_VERSION, found_in):
            for version, entries in old["samples"].items():
                for name in SAMPLES.keys() & entries.keys():
                    if samples[version][name] != entries[name]:
                        sys.exit(f"MiniCPM-V {version}, sample {name!r}: the encoding changed; raise ENCODING_VERSION.")
    lines = [
        f" {json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        + "\n }"
        for version, entries in samples.items()
    ]
    GOLDEN.write_text(
        f'{{"encoding_version": {ENCODING_VERSION},\n"environment": {json.dumps(found_in)},\n"samples": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


if __name__ == "__main__":
    write_golden()
