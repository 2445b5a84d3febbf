"""Safetensors files on disk, compared with the library's own reader and writer."""

import json
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpmv_finetune.components.merge import weights as module
from minicpmv_finetune.components.merge.weights import (
    OutputFile,
    OutputTensor,
    StoredTensor,
    as_bytes,
    cast,
    find_index,
    read_header,
    read_headers,
    read_rows,
    row_blocks,
    write_files,
    write_index,
)
from minicpmv_finetune.errors import UserError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "b.bias": torch.arange(5, dtype=torch.bfloat16),
    "c.scale": torch.tensor(2.5, dtype=torch.float64),
    "d.half": torch.linspace(-1, 1, 8, dtype=torch.float16).reshape(2, 2, 2),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def tensors_by_name(path: Path) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for tensor in read_header(path).tensors}


def file_content(header: object, values: bytes = b"", length: int | None = None) -> bytes:
    """The content of a safetensors file, without the library's writer."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def entry(dtype: str = "F32", shape: Sequence[int] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header_gives_the_position_of_each_tensor(path: Path) -> None:
    found = read_header(path)
    content = path.read_bytes()
    assert (found.path, found.metadata) == (path, {"format": "pt"})
    assert {tensor.name for tensor in found.tensors} == TENSORS.keys()
    for tensor in found.tensors:
        expected = TENSORS[tensor.name]
        assert tensor.shape == tuple(expected.shape)
        assert tensor.size == expected.nbytes
        assert content[tensor.start : tensor.start + tensor.size] == bytes(as_bytes(expected))


def test_tensors_are_listed_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        file_content({"z": entry(offsets=(0, 8)), "m": entry(offsets=(16, 24)), "a": entry(offsets=(8, 16))}, bytes(24))
    )
    assert [tensor.name for tensor in read_header(path).tensors] == ["z", "a", "m"]
    assert read_header(path).metadata == {}


def test_a_file_without_tensors_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_content({}))
    assert read_header(path).tensors == []


def test_the_header_of_a_quantized_tensor_can_be_read_but_not_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_content({"q": entry("I4", (3,), (0, 2))}, b"\x01\x02"))
    (tensor,) = read_header(path).tensors
    assert (tensor.dtype, tensor.size) == ("I4", 2)
    with pytest.raises(UserError, match="q is stored as I4"):
        read_rows(tensor)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"", "Expecting value", id="empty"),
        pytest.param(file_content({"a": entry()}, bytes(7)), "bytes instead of", id="a byte too few"),
        pytest.param(file_content({"a": entry()}, bytes(9)), "bytes instead of", id="a byte too many"),
        pytest.param(file_content({}, b"x"), "bytes instead of", id="bytes that belong to no tensor"),
        pytest.param(file_content({"a": entry(shape=(3,))}, bytes(8)), "a has 8 bytes", id="shape of another size"),
        pytest.param(file_content({"a": entry("BF16")}, bytes(8)), "a has 8 bytes", id="type of another size"),
        pytest.param(file_content({"a": {"dtype": "F32"}}), "shape", id="a field is missing"),
        pytest.param(file_content([1]), "not a JSON object", id="array"),
        pytest.param(file_content(b"{}", length=100_000_001), "header too long", id="longer than the format allows"),
    ],
)
def test_an_incomplete_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.safetensors: not a complete safetensors file \(.*{why}"):
        read_header(path)


def test_a_header_may_be_as_long_as_the_format_allows(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_content(b"{}", length=100_000_000))
    # The length alone is accepted; the number of bytes is not.
    with pytest.raises(UserError, match="bytes instead of 100000008"):
        read_header(path)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_in_its_stored_type(path: Path, name: str) -> None:
    found = read_rows(tensors_by_name(path)[name])
    assert found.dtype == TENSORS[name].dtype
    assert torch.equal(found, TENSORS[name])


def test_some_rows_of_a_tensor_can_be_read(path: Path) -> None:
    tensor = tensors_by_name(path)["a.weight"]
    for start in range(5):
        for end in range(start, 5):
            assert torch.equal(read_rows(tensor, start, end), TENSORS["a.weight"][start:end])
    assert torch.equal(read_rows(tensor, 3), TENSORS["a.weight"][3:])
    assert torch.equal(read_rows(tensors_by_name(path)["d.half"], 1, 2), TENSORS["d.half"][1:])


def test_a_tensor_without_rows_can_be_read(tmp_path: Path) -> None:
    save_file({"empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    (tensor,) = read_header(tmp_path / "model.safetensors").tensors
    assert read_rows(tensor).shape == (0, 4)
    assert list(row_blocks(tensor)) == []


def test_a_file_that_is_cut_after_its_header_was_read_is_an_error(path: Path) -> None:
    tensor = read_header(path).tensors[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: the file ends too early"):
        read_rows(tensor)


def stored(*shape: int) -> StoredTensor:
    return StoredTensor("w", Path("model.safetensors"), "BF16", shape, 0, 0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 4), [(0, 2), (2, 4), (4, 5)]),  # a row has 16 bytes in float32
        ((4, 4), [(0, 2), (2, 4)]),
        ((3, 2, 2), [(0, 2), (2, 3)]),
        ((2, 9), [(0, 1), (1, 2)]),  # a row is larger than a block
        ((10,), [(0, 8), (8, 10)]),
        ((), [(0, 1)]),
        ((3, 0), [(0, 3)]),
    ],
)
def test_blocks_are_complete_rows_within_the_size_limit(
    shape: tuple[int, ...], expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 32)
    assert list(row_blocks(stored(*shape))) == expected


def test_a_block_has_at_most_one_mebibyte() -> None:
    blocks = list(row_blocks(stored(1000, 1024)))
    assert blocks == [(start, min(start + 256, 1000)) for start in range(0, 1000, 256)]


def test_values_are_rounded_to_the_stored_type() -> None:
    values = torch.tensor([1.00390625, 3e38, -0.1])
    for name, dtype in {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }.items():
        assert torch.equal(cast(values, name), values.to(dtype))


def test_bytes_are_in_the_order_of_the_values() -> None:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert bytes(as_bytes(values)) == struct.pack("<6f", 0, 1, 2, 3, 4, 5)
    assert bytes(as_bytes(values.T)) == struct.pack("<6f", 0, 3, 1, 4, 2, 5)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"format": "pt1"}, {"format": "pt12"}, {"format": "pt123"}])
def test_the_library_reads_a_written_header(path: Path, tmp_path: Path, metadata: dict[str, str]) -> None:
    tensors = read_header(path).tensors
    output = OutputFile("new.safetensors", metadata, [OutputTensor(f"new.{t.name}", t.name, t) for t in tensors])
    header = output.header()
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert len(header[8:]) - len(header[8:].rstrip(b" ")) < 8
    (tmp_path / "new.safetensors").write_bytes(header + b"".join(bytes(as_bytes(TENSORS[t.name])) for t in tensors))
    found = read_header(tmp_path / "new.safetensors")
    assert found.metadata == metadata
    assert ("__metadata__" in json.loads(header[8:])) == bool(metadata)
    for name, tensor in load_file(tmp_path / "new.safetensors").items():
        assert torch.equal(tensor, TENSORS[name.removeprefix("new.")])


def output_files(path: Path) -> list[OutputFile]:
    """The source's tensors in two files, with other names."""
    tensors = [OutputTensor(f"new.{tensor.name}", tensor.name, tensor) for tensor in read_header(path).tensors]
    return [
        OutputFile("one.safetensors", {"format": "pt"}, tensors[:2]),
        OutputFile("two.safetensors", {}, tensors[2:]),
    ]


@pytest.mark.parametrize("copied_at_once", [1, 7, 10**6])
def test_written_files_contain_new_values_and_copies_of_the_source(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied_at_once: int
) -> None:
    monkeypatch.setattr(module, "_COPY_BYTES", copied_at_once)
    folder = tmp_path / "merged"
    folder.mkdir()
    done: list[int] = []

    def blocks(tensor: OutputTensor) -> list[memoryview] | None:
        if tensor.module != "a.weight":
            return None
        return [as_bytes(-read_rows(tensor.source, start, start + 1)) for start in range(4)]

    files = output_files(path)
    write_files(folder, files, blocks, done.append)
    found = {name: tensor for file in files for name, tensor in load_file(folder / file.name).items()}
    assert found.keys() == {f"new.{name}" for name in TENSORS}
    for name, tensor in TENSORS.items():
        assert torch.equal(found[f"new.{name}"], -tensor if name == "a.weight" else tensor)
    assert sum(done) == sum(tensor.nbytes for tensor in TENSORS.values())
    assert max(done) <= max(copied_at_once, 12)


def test_blocks_of_another_size_than_in_the_header_are_an_error(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"one\.safetensors: \d+ bytes were written, but the header announces \d+"):
        write_files(tmp_path, output_files(path)[:1], lambda tensor: [memoryview(b"short")], lambda size: None)


def test_writing_to_a_full_disk_is_an_error(path: Path, tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_files(tmp_path, output_files(path), lambda tensor: None, lambda size: None)


def test_only_a_few_blocks_wait_for_the_disk(path: Path, tmp_path: Path) -> None:
    """Memory does not grow: a block is written before many more blocks are computed."""
    computed, written, ahead = 0, 0, []

    def blocks(tensor: OutputTensor) -> Iterator[memoryview]:
        nonlocal computed
        for _ in range(tensor.source.size):
            ahead.append(computed - written)
            computed += 1
            yield memoryview(bytes(1))

    def on_done(size: int) -> None:
        nonlocal written
        written += 1

    write_files(tmp_path, output_files(path), blocks, on_done)
    assert computed == written == sum(tensor.nbytes for tensor in TENSORS.values())
    assert max(ahead) <= 10


def test_one_thread_writes_and_syncs_each_file(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    threads: set[int] = set()
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append((os.fstat(number).st_ino, os.fstat(number).st_size)))
    monkeypatch.setattr(module, "_COPY_BYTES", 1)

    def wait(size: int) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.001)

    write_files(folder, output_files(path), lambda tensor: None, wait)
    # Two threads would mix up the order of a file's bytes.
    assert len(threads) == 1
    written = [(folder / file.name).stat() for file in output_files(path)]
    assert synced == [(found.st_ino, found.st_size) for found in written]


SHARDS = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]


def write_sharded(folder: Path, **metadata: object) -> Path:
    """Six files of one tensor each, which the index lists in another order."""
    folder.mkdir()
    for number, name in enumerate(SHARDS):
        save_file({f"layers.{number}": torch.zeros(2, number)}, folder / name)
    names = {f"layers.{number}": SHARDS[number] for number in (3, 0, 5, 1, 4, 2)}
    document = {"metadata": metadata, "weight_map": names, "another": 1}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return folder


def test_a_sharded_checkpoint_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "sharded")
    assert find_index(folder) == folder / "model.safetensors.index.json"
    assert [file.path.name for file in read_headers(folder)] == SHARDS
    assert [tensor.name for file in read_headers(folder) for tensor in file.tensors] == [
        f"layers.{number}" for number in range(6)
    ]


def test_a_missing_file_of_the_index_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "sharded")
    (folder / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=rf"{SHARDS[1]}: the index names this file, but it is missing"):
        read_headers(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "below/model.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_sharded(tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.0": SHARDS[0], "layers.1": name}}))
    with pytest.raises(UserError, match="outside the folder"):
        read_headers(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"x": 1}}'])
def test_an_invalid_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json: not an index of weights"):
        read_headers(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_checkpoint_in_one_file_needs_no_index(tmp_path: Path, name: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / name)
    assert find_index(tmp_path) is None
    assert [file.path for file in read_headers(tmp_path)] == [tmp_path / name]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="no safetensors weights here"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {"total_size": 120}),
        ({"total_size": 1, "total_parameters": 1}, {"total_size": 120, "total_parameters": 30}),
        ({"author": "someone"}, {"author": "someone", "total_size": 120}),
    ],
)
def test_an_index_is_rewritten_for_the_new_files(
    tmp_path: Path, metadata: dict[str, object], expected: dict[str, object]
) -> None:
    base, folder = write_sharded(tmp_path / "base", **metadata), tmp_path / "merged"
    folder.mkdir()
    files = [
        OutputFile(
            file.path.name, {}, [OutputTensor(f"new.{tensor.name}", tensor.name, tensor) for tensor in file.tensors]
        )
        for file in read_headers(base)
    ]
    write_index(base, folder, files)
    names = {f"new.layers.{number}": name for number, name in enumerate(SHARDS)}
    found = json.loads((folder / "model.safetensors.index.json").read_text())
    assert found == {"metadata": expected, "weight_map": names, "another": 1}


def test_no_index_is_written_for_a_checkpoint_in_one_file(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    write_index(path.parent, folder, output_files(path))
    assert list(folder.iterdir()) == []
