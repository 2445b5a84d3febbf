import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest

from minicpmv_finetune import storage
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.shards import cache as module
from minicpmv_finetune.shards.cache import open_shards
from minicpmv_finetune.shards.format import MANIFEST_FILE, ShardReader, read_manifest
from tests.shards.example_shards import ROWS, assert_same_row, example_row, write_example_shards

SHARDS = ["train-00000.parquet", "train-00001.parquet", "train-00002.parquet", "train-00003.parquet"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_example_shards(tmp_path / "shards")


@pytest.fixture
def uri(folder: Path, s3_uri: str) -> str:
    """URI of the same shards in a store."""
    for path in folder.iterdir():
        storage.write_bytes(f"{s3_uri}/shards/{path.name}", path.read_bytes())
    return f"{s3_uri}/shards"


class Copy(NamedTuple):
    """The folder that `open_shards` returns, and the shards in it."""

    folder: Path
    files: list[str]

    @classmethod
    def of(cls, folder: Path) -> "Copy":
        return cls(folder, sorted(path.name for path in folder.glob("*.parquet")))


def assert_readable(folder: Path) -> None:
    for number, row in enumerate(ShardReader(folder, "train")):
        assert_same_row(row, example_row(number))
    assert len(ShardReader(folder, "train")) == ROWS


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_local_folder_is_used_where_it_is(folder: Path, tmp_path: Path) -> None:
    assert open_shards(str(folder), tmp_path / "cache") == folder
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_a_local_folder_is_verified_again_after_a_change(folder: Path, tmp_path: Path) -> None:
    open_shards(str(folder), tmp_path / "cache")
    flip_bit(folder / SHARDS[1])
    with pytest.raises(UserError, match=f"{SHARDS[1]}: its content differs"):
        open_shards(str(folder), tmp_path / "cache")


def test_a_verified_folder_is_not_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_shards(str(folder), tmp_path / "cache")
    monkeypatch.setattr(module, "verify_shards", lambda *arguments: pytest.fail("the folder was verified again"))
    open_shards(str(folder), tmp_path / "cache")


def test_shards_in_a_store_are_copied_to_this_machine(uri: str, tmp_path: Path) -> None:
    copy = Copy.of(open_shards(uri, tmp_path / "cache"))
    assert copy.files == SHARDS
    assert_readable(copy.folder)
    assert open_shards(uri, tmp_path / "cache") == copy.folder


def test_a_manifest_without_files_leads_to_its_location(uri: str, folder: Path, tmp_path: Path) -> None:
    """The manifest is an artifact that was downloaded, while its shards stayed in the store."""
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    manifest = read_manifest(folder).model_copy(update={"location": uri})
    (artifact / MANIFEST_FILE).write_text(manifest.model_dump_json())
    assert_readable(open_shards(str(artifact), tmp_path / "cache"))
    assert not list(artifact.glob("*.parquet"))
    assert_readable(artifact)  # row by row from the store


def test_a_damaged_file_of_the_copy_is_downloaded_again_before_its_use(uri: str, tmp_path: Path) -> None:
    copy = open_shards(uri, tmp_path / "cache")
    before = {name: (copy / name).stat().st_ino for name in SHARDS}
    flip_bit(copy / SHARDS[2])
    (copy / SHARDS[0]).unlink()
    assert_readable(open_shards(uri, tmp_path / "cache"))
    assert (copy / SHARDS[1]).stat().st_ino == before[SHARDS[1]], "the other files stay"


def test_a_shard_that_is_damaged_in_the_store_is_reported(uri: str, folder: Path, tmp_path: Path) -> None:
    flip_bit(folder / SHARDS[3])
    storage.write_bytes(f"{uri}/{SHARDS[3]}", (folder / SHARDS[3]).read_bytes())
    with pytest.raises(UserError, match=f"{SHARDS[3]}: its content differs .* delete {uri}"):
        open_shards(uri, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(f"*{SHARDS[3]}*")), "no part of it stays"


def test_rows_are_read_from_the_store_if_the_disk_is_too_small(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30 + 1000))
    copy = Copy.of(open_shards(uri, tmp_path / "cache"))
    assert copy.files == []
    assert_readable(copy.folder)


def test_damage_is_found_in_rows_read_from_the_store(uri: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    manifest = read_manifest(folder).model_copy(update={"location": uri})
    (tmp_path / "artifact" / MANIFEST_FILE).write_text(manifest.model_dump_json())
    flip_bit(folder / SHARDS[0])
    storage.write_bytes(f"{uri}/{SHARDS[0]}", (folder / SHARDS[0]).read_bytes())
    with pytest.raises(UserError, match=f"{uri}: damaged"):
        list(ShardReader(tmp_path / "artifact", "train"))


def _open_last_row(uri: str, cache: Path) -> tuple[Path, str]:
    folder = open_shards(uri, cache)
    return folder, ShardReader(folder, "train")[ROWS - 1].id


def test_several_processes_share_one_copy(uri: str, tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        found = list(pool.map(_open_last_row, [uri] * 6, [tmp_path / "cache"] * 6))
    assert len(set(found)) == 1
    assert found[0][1] == f"row-{ROWS - 1}"
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == len(SHARDS)


def test_other_shards_at_the_same_uri_get_another_copy(uri: str, tmp_path: Path) -> None:
    open_shards(uri, tmp_path / "cache")
    for path in write_example_shards(tmp_path / "other", seed=1).iterdir():
        storage.write_bytes(f"{uri}/{path.name}", path.read_bytes())
    assert_same_row(ShardReader(open_shards(uri, tmp_path / "cache"), "train")[5], example_row(5, seed=1))


def test_missing_shards_and_a_missing_store_are_reported(
    s3_uri: str, unreachable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not found"):
        open_shards(f"{s3_uri}/nowhere", tmp_path)
    with pytest.raises(UserError, match="preprocess has not finished"):
        open_shards(str(tmp_path), tmp_path / "cache")
    monkeypatch.setenv("AWS_ENDPOINT_URL", unreachable)
    with pytest.raises(RetryableError, match="does not answer"):
        open_shards(f"{s3_uri}/shards", tmp_path)
