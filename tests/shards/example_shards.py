"""Small example shards for the tests that write, copy and read shards."""

from pathlib import Path

import numpy as np

from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.slicing import SlicingConfig
from minicpmv_finetune.shards.codecs import Codec, store_slices
from minicpmv_finetune.shards.format import MANIFEST_FILE, Manifest, StoredRow, slicing_fields, write_shard

ROWS = 40
ROWS_PER_SHARD = 13


def example_row(number: int, seed: int = 0) -> ModelInput:
    """A row that differs from all others: it has no slice, one slice, or several slices of different sizes."""
    random = np.random.default_rng([seed, number])
    slices = [random.integers(0, 256, (14 * side, 28, 3), dtype=np.uint8) for side in range(1, 1 + number % 4)]
    ids = random.integers(0, 500, 5 + number).tolist()
    return ModelInput(f"row-{number}", ids, [-100, *ids[1:]], slices)


def stored_row(row: ModelInput, codec: Codec = "raw") -> StoredRow:
    return StoredRow(row.id, row.input_ids, row.labels, store_slices(row.slices, codec))


def write_example_shards(folder: Path, seed: int = 0, rows: int = ROWS, codec: Codec = "raw") -> Path:
    """Write a shards folder with many row groups in several files."""
    folder.mkdir(exist_ok=True)
    written = [example_row(number, seed) for number in range(rows)]
    shards = [
        write_shard(
            folder / f"train-{number:05d}.parquet",
            [stored_row(row, codec) for row in written[start : start + ROWS_PER_SHARD]],
        )
        for number, start in enumerate(range(0, rows, ROWS_PER_SHARD))
    ]
    manifest = Manifest(
        generation="4.6",
        tokenizer_sha256="",
        max_slice_nums=9,
        model_max_length=2048,
        patch_size=14,
        pad_token_id=0,
        codec=codec,
        slicing=slicing_fields(SlicingConfig()),
        data_fingerprint="",
        key=f"key-{seed}",
        shards={"train": shards},
        lengths={"train": [len(row.input_ids) for row in written]},
        slices={"train": sum(len(row.slices) for row in written)},
        bytes=sum(shard.bytes for shard in shards),
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return folder


def assert_same_row(found: ModelInput, expected: ModelInput) -> None:
    assert found.id == expected.id
    assert list(found.input_ids) == list(expected.input_ids)
    assert list(found.labels) == list(expected.labels)
    assert len(found.slices) == len(expected.slices)
    for pixels, expected_pixels in zip(found.slices, expected.slices, strict=True):
        np.testing.assert_array_equal(pixels, expected_pixels)
