import errno
import gc
import hashlib
import io
import itertools
import json
import pickle
import resource
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, Dataset

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.shards import format as module
from minicpmv_finetune.shards.codecs import Codec, StoredImages
from minicpmv_finetune.shards.format import (
    MANIFEST_FILE,
    ShardReader,
    StoredRow,
    damaged_shards,
    read_manifest,
    verify_shards,
    write_shard,
)
from tests.shards.example_shards import ROWS, assert_same_row, example_row, stored_row, write_example_shards

DEFAULT_ROW_GROUP_BYTES = module.ROW_GROUP_BYTES


@pytest.fixture(autouse=True)
def _small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 8_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_example_shards(tmp_path / "shards")


def test_rows_are_read_unchanged_in_any_order(folder: Path) -> None:
    reader = ShardReader(folder, "train")
    assert len({shard.file for shard in reader.manifest.shards["train"]}) > 1
    assert len(reader) == sum(shard.rows for shard in reader.manifest.shards["train"]) == ROWS
    for number in np.random.default_rng(0).permutation(ROWS):
        assert_same_row(reader[number], example_row(number))
    assert [row.id for row in reader] == [f"row-{number}" for number in range(ROWS)]


def test_a_reader_is_indexed_like_a_list(folder: Path) -> None:
    reader = ShardReader(folder, "train")
    assert_same_row(reader[-1], example_row(ROWS - 1))
    assert [row.id for row in reader[2:9:3]] == ["row-2", "row-5", "row-8"]
    for outside in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError, match=f"^{outside}$"):
            reader[outside]


def test_without_images_rows_have_only_tokens(folder: Path) -> None:
    reader = pickle.loads(pickle.dumps(ShardReader(folder, "train", images=False)))
    for number, row in enumerate(reader):
        expected = example_row(number)
        assert_same_row(row, ModelInput(expected.id, expected.input_ids, expected.labels, []))


def test_a_shard_of_many_row_groups_is_read_by_groups(folder: Path) -> None:
    assert pq.ParquetFile(folder / "train-00000.parquet").num_row_groups > 1


@pytest.mark.parametrize(("limit", "expected"), [(140, [1] * 7), (280, [2, 2, 2, 1]), (281, [3, 3, 1]), (10_000, [7])])
def test_a_row_group_ends_where_its_rows_reach_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, expected: list[int]
) -> None:
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", limit)
    images = StoredImages([b"p" * 30, b"q" * 30], [])
    rows = [StoredRow(f"row-{number}", range(10), range(10), images) for number in range(7)]
    assert {row.bytes for row in rows} == {140}
    shard = write_shard(tmp_path / "a.parquet", rows)
    groups = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == expected
    assert (shard.file, shard.rows, shard.bytes) == ("a.parquet", 7, (tmp_path / "a.parquet").stat().st_size)


def test_a_row_group_has_one_mebibyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", DEFAULT_ROW_GROUP_BYTES)
    rows = [StoredRow(str(number), [], [], StoredImages([bytes(2**18)], [])) for number in range(9)]
    write_shard(tmp_path / "a.parquet", rows)
    groups = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [4, 4, 1]


def test_a_shard_without_rows_is_a_file(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "a.parquet", []).rows == 0
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups == 0


def test_sizes_of_slices_in_patches_are_known_without_decoding(folder: Path) -> None:
    expected = [
        [(pixels.shape[0] // 14, pixels.shape[1] // 14) for pixels in example_row(n).slices] for n in range(ROWS)
    ]
    sizes, first_slice = ShardReader(folder, "train", images=False).slice_sizes()
    assert [part.tolist() for part in np.split(sizes, first_slice[1:-1])] == [list(map(list, row)) for row in expected]


def test_a_manifest_counts_a_splits_rows_and_lists_all_files(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert (manifest.rows("train"), manifest.rows("eval")) == (ROWS, 0)
    both = manifest.model_copy(update={"shards": {"train": manifest.files[:1], "eval": manifest.files[1:]}})
    assert both.files == manifest.files


@pytest.mark.parametrize("codec", ["raw", "webp-lossless", "png"])
def test_every_codec_of_slices_is_lossless(codec: Codec, tmp_path: Path) -> None:
    for number, row in enumerate(ShardReader(write_example_shards(tmp_path / "shards", codec=codec), "train")):
        assert_same_row(row, example_row(number))


def test_a_split_without_rows_is_empty(folder: Path) -> None:
    assert list(ShardReader(folder, "eval")) == []


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    first, second = write_example_shards(tmp_path / "a"), write_example_shards(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_shards_are_written_and_read_without_pandas(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from minicpmv_finetune.shards.format import ShardReader, write_shard; "
        "folder, path = map(Path, sys.argv[1:]); reader = ShardReader(folder, 'train'); print(reader[0].id); "
        "write_shard(path, reader.stored_rows()); print('pandas' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "again.parquet")]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == b"row-0\nFalse\n"


def test_a_new_reader_sees_a_rewritten_folder(folder: Path) -> None:
    assert_same_row(ShardReader(folder, "train")[3], example_row(3))
    write_example_shards(folder, seed=1)
    assert_same_row(ShardReader(folder, "train")[3], example_row(3, seed=1))


def test_rows_share_memory_that_cannot_be_written_to(folder: Path) -> None:
    reader = ShardReader(folder, "train")
    with pytest.raises(ValueError, match="read-only"):
        reader[3].slices[0][:] = 0
    reader[3].input_ids[:] = 0
    assert_same_row(reader[3], example_row(3))


def identity(rows: Sequence[ModelInput]) -> Sequence[ModelInput]:
    return rows


def test_worker_processes_read_the_same_rows(folder: Path) -> None:
    reader = ShardReader(folder, "train")
    assert_same_row(reader[0], example_row(0))  # a file is open and a row group cached when the workers start
    loader: DataLoader[ModelInput] = DataLoader(
        cast("Dataset[ModelInput]", reader),
        batch_size=8,
        num_workers=2,
        collate_fn=identity,
        multiprocessing_context="fork",
    )
    for number, row in enumerate(row for batch in loader for row in batch):
        assert_same_row(row, example_row(number))


def test_a_pickled_reader_carries_no_data(folder: Path) -> None:
    reader = ShardReader(folder, "train")
    assert_same_row(reader[5], example_row(5))
    assert len(pickle.dumps(reader)) < 1000
    assert_same_row(pickle.loads(pickle.dumps(reader))[5], example_row(5))


def test_whole_shards_pass_verification(folder: Path) -> None:
    manifest = read_manifest(folder)
    verify_shards(folder, manifest)
    for shard in manifest.shards["train"]:
        assert hashlib.sha256((folder / shard.file).read_bytes()).hexdigest() == shard.sha256


def test_verification_finds_a_flipped_bit(folder: Path) -> None:
    path = folder / read_manifest(folder).shards["train"][-1].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}: its content differs"):
        verify_shards(folder, read_manifest(folder))


def test_only_damaged_shards_are_listed(folder: Path) -> None:
    names = [shard.file for shard in read_manifest(folder).files]
    (folder / names[0]).unlink()
    with (folder / names[2]).open("ab") as file:
        file.write(b"more")
    (folder / names[3]).unlink()
    (folder / names[3]).mkdir()
    damaged = damaged_shards(folder, read_manifest(folder).files)
    assert [shard.file for shard in damaged] == [names[0], names[2], names[3]]
    # The size is right, but not the hash.
    other = read_manifest(folder).files[1].model_copy(update={"sha256": "0" * 64})
    assert damaged_shards(folder, [other]) == [other]


def test_a_damaged_footer_is_refused_in_one_sentence(folder: Path) -> None:
    path = folder / read_manifest(folder).shards["train"][0].file
    intact = path.read_bytes()
    first = len(intact) - 8 - int.from_bytes(intact[-8:-4], "little")
    refused = []
    for place in range(first, len(intact), 3):
        path.unlink()
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 0x5A]) + intact[place + 1 :])
        try:
            ShardReader(folder, "train")
        except UserError as error:
            refused.append(str(error))
    assert any("thrift" in sentence for sentence in refused)  # for which pyarrow raises an OSError
    assert all(sentence.endswith("run preprocess again.") for sentence in refused)


def test_a_read_that_fails_once_is_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, failures = pq.ParquetFile.read_row_group, [OSError("transfer"), pa.ArrowInvalid("CRC")]
    calls = itertools.count(1)

    def flaky(self: pq.ParquetFile, *arguments: Any, **options: Any) -> pa.Table:
        if next(calls) % 2 and failures:
            raise failures.pop()
        return original(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", flaky)
    reader = ShardReader(folder, "train")
    assert_same_row(reader[0], example_row(0))
    assert_same_row(reader[ROWS - 1], example_row(ROWS - 1))
    assert not failures


def test_neighboring_rows_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pq.ParquetFile.read_row_group
    decoded: list[int] = []

    def counting(self: pq.ParquetFile, group: int, *arguments: Any, **options: Any) -> pa.Table:
        decoded.append(group)
        return original(self, group, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    reader = ShardReader(folder, "train")
    for number in (0, 1, 0, 1):
        assert_same_row(reader[number], example_row(number))
    assert len(decoded) == len(set(decoded))


def test_a_file_in_a_store_is_read_like_a_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(100))
    requests: list[tuple[str, int, int]] = []

    def read_bytes(uri: str, span: tuple[int, int]) -> bytes:
        requests.append((uri, *span))
        return content[span[0] : span[0] + span[1]]

    monkeypatch.setattr(module.storage, "read_bytes", read_bytes)
    remote, local = module._RemoteFile("s3://bucket/a", len(content)), io.BytesIO(content)
    assert remote.read(3) == local.read(3)
    assert remote.readable()
    assert remote.seekable()
    steps = [(0, io.SEEK_SET, 4), (3, io.SEEK_CUR, 5), (-8, io.SEEK_END, 8), (0, io.SEEK_CUR, 4), (-9, io.SEEK_END, 99)]
    steps += [
        (50, io.SEEK_SET, 0),
        (7, io.SEEK_SET, -1),
        (99, io.SEEK_SET, 1),
        (-3, io.SEEK_CUR, 2),
        (98, io.SEEK_SET, -1),
    ]
    for offset, whence, size in steps:
        assert remote.seek(offset, whence) == local.seek(offset, whence) == remote.tell()
        assert remote.read(size) == local.read(size)
        assert remote.tell() == local.tell()
    remote.seek(90)
    assert remote.read() == content[90:]
    # No request is empty or goes beyond the end.
    assert all(uri == "s3://bucket/a" and length > 0 and start + length <= 100 for uri, start, length in requests)


@pytest.fixture
def few_files() -> Iterator[int]:
    """Lets this process open only a few more files, unless it asks for more; the number that are open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # otherwise files of earlier tests would be closed in between
    opened = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 8, limits[1]))
    yield opened
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_shards_than_a_process_may_open_at_first(
    folder: Path, few_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPARE_FILES", 2)
    readers = [ShardReader(folder, "train") for _ in range(5)]
    assert len(list(Path("/dev/fd").iterdir())) > few_files + 8
    assert all(len(reader) == ROWS for reader in readers)


@pytest.fixture
def set_limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[tuple[int, int]]]:
    """Gives this process limits of open files, counted from those that are open; what is set then is only noted."""
    opened = len(list(Path("/dev/fd").iterdir()))
    noted: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "_SPARE_FILES", 2)
    monkeypatch.setattr(module, "_count_open_files", lambda: opened)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: noted.append((limits[0] - opened, limits[1] - opened)))

    def set_limits(soft: int, hard: int) -> list[tuple[int, int]]:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (opened + soft, opened + hard))
        return noted

    return set_limits


@pytest.mark.parametrize(
    ("soft", "hard", "noted"),
    [(6, 9, []), (5, 9, [(6, 9)]), (0, 4, [(4, 4)])],
    ids=["suffices", "is raised as far as needed", "is raised as far as allowed"],
)
def test_the_limit_of_open_files(
    folder: Path,
    set_limits: Callable[[int, int], list[tuple[int, int]]],
    soft: int,
    hard: int,
    noted: list[tuple[int, int]],
) -> None:
    set_files = set_limits(soft, hard)
    assert len(ShardReader(folder, "train")) == ROWS
    assert set_files == noted


def test_a_limit_of_open_files_that_cannot_be_raised_as_far_as_needed(
    folder: Path, set_limits: Callable[[int, int], list[tuple[int, int]]]
) -> None:
    set_limits(0, 3)
    with pytest.raises(UserError, match="has 4 shards"):
        ShardReader(folder, "train")


def test_more_shards_than_a_process_may_ever_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3, 3))
    with pytest.raises(UserError, match="has 4 shards, and a process may have 3 files open here; raise the limit"):
        ShardReader(folder, "train")


def test_a_missing_file_is_explained(folder: Path) -> None:
    (folder / "train-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00001.parquet: listed in manifest.json but missing"):
        verify_shards(folder, read_manifest(folder))
    with pytest.raises(UserError, match=r"train-00001.parquet: listed in manifest.json but missing"):
        ShardReader(folder, "train")


def test_a_fault_of_the_disk_is_not_called_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(OSError, match="Input/output error"):
        ShardReader(folder, "train")


def test_a_damaged_image_is_explained(folder: Path) -> None:
    row = stored_row(example_row(3), "png")
    damaged = replace(row, images=replace(row.images, parts=[b"no image", *row.images.parts[1:]]))
    manifest = read_manifest(folder)
    shard = write_shard(folder / manifest.shards["train"][0].file, [damaged])
    document = manifest.model_copy(update={"codec": "png", "shards": {"train": [shard]}}).model_dump_json()
    (folder / MANIFEST_FILE).write_text(document)
    reader = ShardReader(folder, "train")
    with pytest.raises(UserError, match=f"^{folder}: an image is damaged"):
        reader[0]


def test_lengths_take_four_bytes_each(folder: Path) -> None:
    lengths = read_manifest(folder).lengths["train"]
    assert isinstance(lengths, array)
    assert lengths.itemsize == 4


def test_a_truncated_file_is_explained(folder: Path) -> None:
    path = folder / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train-00001.parquet: damaged"):
        ShardReader(folder, "train")


def test_without_a_manifest_there_are_no_shards(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match="preprocess has not finished"):
        ShardReader(folder, "train")


def test_a_newer_manifest_is_refused(folder: Path) -> None:
    document = json.loads((folder / MANIFEST_FILE).read_text())
    assert document["schema_version"] == 2
    (folder / MANIFEST_FILE).write_text(json.dumps(document | {"schema_version": 3}))
    with pytest.raises(UserError, match="upgrade minicpmv-finetune"):
        read_manifest(folder)
