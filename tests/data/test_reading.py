"""Reading a file in pieces gives the same items as parsing it at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minicpmv_finetune.data import reading
from minicpmv_finetune.data.reading import Record, read_records
from minicpmv_finetune.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SMALL_PIECES = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def records(folder: Path, content: str | bytes, piece: int, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    monkeypatch.setattr(reading, "_CHUNK", piece)
    path = folder / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return list(read_records("data.json", path))


@SMALL_PIECES
@example([0.0, 1e-7, 1.5e300, -1], 1, True, None)
@given(st.lists(JSON, min_size=1, max_size=6), st.sampled_from([1, 2, 3, 7, 64]), st.booleans(), st.none() | st.just(1))
def test_an_array_is_parsed_as_by_json(
    tmp_path: Path, items: list[Any], piece: int, ascii_only: bool, indent: int | None
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        text = json.dumps(items, ensure_ascii=ascii_only, indent=indent)
        found = records(tmp_path, text, piece, monkeypatch)
        assert [(record.index, record.content) for record in found] == list(enumerate(items))
        wrapped = f'{{"version": [1, {{}}], "data": {text}, "more": {{"data": []}} }}\n'
        assert [record.content for record in records(tmp_path, wrapped, piece, monkeypatch)] == items


@SMALL_PIECES
@given(
    st.lists(st.dictionaries(st.text().filter(lambda key: key != "data"), JSON, max_size=3), min_size=1, max_size=5),
    st.sampled_from([1, 3, 64]),
)
def test_lines_are_parsed_as_by_json(tmp_path: Path, items: list[dict[str, Any]], piece: int) -> None:
    items = [{"id": 1, **item} for item in items]
    with pytest.MonkeyPatch.context() as monkeypatch:
        text = "\n\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        assert [record.content for record in records(tmp_path, text, piece, monkeypatch)] == items


@pytest.mark.parametrize("piece", [1, 5, 1 << 18])
@pytest.mark.parametrize(
    ("text", "line", "column", "items"),
    [
        ('[{"a": 1},\n {"a" 1}]', 2, 7, 1),
        ('[{"a": 1},\n\n {"a": "é\nb"}]', 3, 10, 1),
        ('[{"a": 1}\n{"a": 1}]', 2, 1, 1),
        ('[{"a": 1}]\nmore', 2, 1, 1),
        ('[{"a": tru', 1, 8, 0),
        ('[{"a": "endless', 1, 8, 0),
        ('{"data": [1, 2}', 1, 15, 2),
        ('{"data": [1], "x" 2}', 1, 19, 1),
        ('{"data": [1]} {}', 1, 15, 1),
        ('{\n "data" [1]}', 2, 9, 0),
    ],
)
def test_invalid_json_is_reported_by_line_and_column(
    text: str, line: int, column: int, items: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *good, last = records(tmp_path, text, piece, monkeypatch)
    assert (len(good), last.is_last, last.line) == (items, True, line)
    assert f"line {line}, column {column} " in str(last.problem)
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads(text)
    assert (raised.value.lineno, raised.value.colno) == (line, column), "the same place as when parsed at once"


def test_a_text_without_an_end_is_not_read_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_SAMPLE", 1000)
    (record,) = records(tmp_path, f'["{"x" * 100_000}"]', 64, monkeypatch)
    assert "a sample of more than 1,000 characters" in str(record.problem)
    lines = records(tmp_path, f'{{"a": 1}}\n{{"b": "{"x" * 100_000}"}}\n', 64, monkeypatch)
    assert [record.is_last for record in lines] == [False, True]


@pytest.mark.parametrize("piece", [1, 64])
def test_the_position_of_an_invalid_byte_is_reported(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 12\)"):
        records(tmp_path, '["é", "éé'.encode() + b'\xff"]', piece, monkeypatch)


def test_memory_is_bounded_by_a_piece(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(20_000):
            file.write(f'{{"id": {number}, "text": "{"x" * 1000}"}}, ')
        file.write("{}]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records("large.json", path)) == 20_001
        assert tracemalloc.get_traced_memory()[1] < 4e6, "bytes for a file of 20 MB"
    finally:
        tracemalloc.stop()


DOUBLED = '{"id": 1, "image": {"<image>": "a.png", "<image>": "b.png"}, "x": {"\\ud83d": 1, "\\ud83d": 2}}'


@pytest.mark.parametrize("piece", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    "text",
    [
        f'[{{"id": 0}}, {DOUBLED}, {{"id": 2}}]',
        f'{{"id": 0}}\n{DOUBLED}\n{{"id": 2}}\n',
        f'{{"data": [0, {DOUBLED}, 2]}}',
    ],
)
def test_an_item_with_doubled_keys_is_reported_and_the_others_are_read(
    text: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = records(tmp_path, text, piece, monkeypatch)
    assert [record.problem is not None for record in found] == [False, True, False]
    problem = found[1].problem
    assert problem is not None
    assert (problem.reason, found[1].index, found[1].content["id"]) == ("doubled_key", 1, 1)
    assert "has the key '<image>', '\\ud83d' more than once" in str(problem)


def test_a_single_sample_with_doubled_keys_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = records(tmp_path, DOUBLED, 5, monkeypatch)
    assert record.problem is not None


def test_samples_that_occur_twice_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, last = records(tmp_path, '{"data": [1],\n "data": [2]}', 64, monkeypatch)
    assert (last.is_last, last.line) == (True, 2)
    assert "data occurs twice" in str(last.problem)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer; fetch it with git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "a web page; download it again"),
        (b"\x1f\x8b\x08", "compressed by gzip; unpack it"),
        (b"PAR1\xff", "a Parquet table; convert it with minicpmv-finetune import-data"),
    ],
)
def test_what_a_file_is_in_place_of_json_is_named(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"data.json: not JSON, it is {words}"):
        records(tmp_path, content, 1 << 18, monkeypatch)
