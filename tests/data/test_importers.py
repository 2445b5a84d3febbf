import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from minicpmv_finetune import storage
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.importers import import_data
from minicpmv_finetune.data.samples import Reject, Sample, read_samples
from minicpmv_finetune.errors import UserError


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(file, "PNG")
    return file.getvalue()


def data_uri(color: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(color)).decode()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(png(name))
    return tmp_path


def run_import(source: str | Path, out: Path, images: str = "") -> list[dict[str, Any]]:
    import_data(str(source), out, images)
    return [json.loads(line) for line in out.read_text().splitlines()]


def read_rejects(out: Path) -> list[Reject]:
    lines = out.with_name(f"{out.stem}.rejects.jsonl").read_text().splitlines()
    return [Reject.model_validate_json(line) for line in lines]


def validate(data: Path, folder: Path) -> list[Sample]:
    validate_data(
        str(data), str(data), folder / "dataset", folder / "rejects.jsonl", ValidationSettings(max_reject_ratio=0)
    )
    return list(read_samples(folder / "dataset", "train"))


LLAVA = [
    {
        "id": "one",
        "image": "red.png",
        "conversations": [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": "Red."}],
    },
    {
        "id": "two",
        "image": ["red.png", "blue.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\n<image>\nDiffer?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {"id": "text", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
]


def test_llava(folder: Path) -> None:
    (folder / "llava.json").write_text(json.dumps(LLAVA))
    out = folder / "new" / "train.jsonl"
    samples = run_import(folder / "llava.json", out)
    assert samples[1] == {
        "id": "two",
        "image": {"<image_00>": str(folder / "red.png"), "<image_01>": str(folder / "blue.png")},
        "conversations": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image_00>\n<image_01>\nDiffer?"},
            {"role": "assistant", "content": "Yes."},
        ],
    }
    assert read_rejects(out) == []
    assert [sample.turns[-2].parts for sample in validate(out, folder)] == [
        (0, "\nColor?"),
        (0, "\n", 1, "\nDiffer?"),
        ("Hi.",),
    ]


def test_images_in_a_separate_folder_are_named_relative_to_the_output(folder: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "llava.json").write_text(json.dumps(LLAVA[:1]))
    (sample,) = run_import(folder / "texts" / "llava.json", folder / "train.jsonl", str(folder))
    assert sample["image"] == {"<image_00>": "red.png"}


def openai(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Red."}]}


def image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def test_openai_messages(folder: Path) -> None:
    lines = [
        openai(image_url(data_uri("red")), {"type": "text", "text": "Or"}, image_url((folder / "blue.png").as_uri())),
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "input_text", "text": "Hi."}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
            ]
        },
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = run_import(folder / "chat.jsonl", folder / "train.jsonl")
    assert samples[0]["image"] == {"<image_00>": data_uri("red"), "<image_01>": "blue.png"}
    assert [turn["role"] for turn in samples[1]["conversations"]] == ["system", "user", "assistant"]
    first, second = validate(folder / "train.jsonl", folder)
    assert first.turns[0].parts == (0, "\nOr\n", 1)
    assert second.turns[2].parts == ("Hello.",)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"id": "v", "video": "clip.mp4", **LLAVA[2]}, "video"),
        (openai({"type": "video_url", "video_url": {"url": "a.mp4"}}), "video"),
        (openai({"type": "input_audio", "input_audio": {}}), "schema"),
        (openai({"type": "text"}), "schema"),
        (openai(image_url("https://example.org/a.png")), "image_refused"),
        (openai(image_url("")), "schema"),
        ({"conversations": "words"}, "schema"),
        (["words"], "schema"),
        ({"image": ["a.png", "b.png"], **openai({"type": "image"})}, "placeholder_missing"),
        ({"image": "a.png", "messages": [{"role": "assistant", "content": "A."}]}, "roles"),
    ],
)
def test_items_that_cannot_be_converted_are_listed(item: Any, reason: str, folder: Path) -> None:
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, [LLAVA[2], item])))
    out = folder / "train.jsonl"
    assert len(run_import(folder / "mixed.jsonl", out)) == 1
    (reject,) = read_rejects(out)
    assert (reject.index, reject.reason) == (1, reason)
    assert reject.message.endswith(".")


def with_image_feature(table: pa.Table, kind: str = "Image") -> pa.Table:
    metadata = {"info": {"features": {"image": {"_type": kind}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(metadata)})


def vqa() -> pa.Table:
    rows = {
        "image": [{"bytes": png("red"), "path": "red.png"}, {"bytes": png("red"), "path": None}],
        "question": ["Color?", "Which?"],
        "answers": [["Red.", "Crimson."], ["Red."]],
    }
    return with_image_feature(pa.table(rows))


def write_arrow(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


@pytest.mark.parametrize("kind", ["saved to disk", "parquet folder", "parquet file"])
def test_hugging_face_datasets(kind: str, folder: Path) -> None:
    source = folder / "set"
    source.mkdir()
    if kind == "saved to disk":
        write_arrow(vqa(), source / "data-00000-of-00001.arrow")
        (source / "state.json").write_text("{}")
    else:
        (source / "data").mkdir()
        parquet.write_table(vqa(), source / "data" / "train-00000-of-00001.parquet")
    out = folder / "new" / "train.jsonl"
    given = source / "data" / "train-*.parquet" if kind == "parquet file" else source
    samples = run_import(given, out)
    assert samples[0]["answers"] == ["Red.", "Crimson."]
    with tarfile.open(out.with_name("train.pictures.tar")) as archive:
        assert len(archive.getmembers()) == 2, "equal images of one kind are stored once"
    first, second = validate(out, folder)
    assert first.turns[0].parts == (0, "\nColor?")
    assert first.images[0].span is not None
    assert first.images[0].sha256 == second.images[0].sha256


def test_chat_rows_of_datasets(folder: Path) -> None:
    rows = {
        "images": [[{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]],
        "messages": [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": "and"},
                        {"type": "image", "text": None},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
            ]
        ],
    }
    parquet.write_table(pa.table(rows), folder / "chat.parquet")
    run_import(folder / "chat.parquet", folder / "train.jsonl")
    (sample,) = validate(folder / "train.jsonl", folder)
    assert sample.turns[0].parts == (0, "\nand\n", 1)


def test_a_video_column_is_recognized_by_the_metadata_of_datasets(folder: Path) -> None:
    parquet.write_table(with_image_feature(vqa(), "Video"), folder / "clips.parquet")
    with pytest.raises(UserError, match=r"2 were rejected; the first is .*clips\.parquet, sample 0: contains a video"):
        import_data(str(folder / "clips.parquet"), folder / "train.jsonl")
    assert {reject.reason for reject in read_rejects(folder / "train.jsonl")} == {"video"}
    assert not (folder / "train.jsonl").exists()
    assert not list(folder.glob("*.tar"))


def test_several_splits_are_refused(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / "set" / "data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(vqa(), folder / "set" / "data" / f"{split}-00000.parquet")
    with pytest.raises(UserError, match=r"contains the splits test, train; give one of them, such as '.*data/test-\*"):
        import_data(str(folder / "set"), folder / "train.jsonl")
    write_arrow(vqa(), folder / "saved" / "train" / "data.arrow")
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match=r"give one of them, such as .*saved/train\."):
        import_data(str(folder / "saved"), folder / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("no.json", None, "not found"),
        ("no.parquet", None, "not found"),
        ("empty", "", "without Parquet or Arrow"),
        ("broken.json", '[{"a": 1}, {"b" 2}]', "line 1: invalid JSON"),
        ("broken.parquet", "words", "not a readable table"),
    ],
)
def test_a_source_that_cannot_be_read_is_explained(name: str, content: str | None, sentence: str, folder: Path) -> None:
    if name == "empty":
        (folder / name).mkdir()
    elif content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        import_data(str(folder / name), folder / "train.jsonl")
    assert not list(folder.glob(".train*"))


def test_sources_in_object_storage_are_imported(s3_uri: str, folder: Path) -> None:
    storage.write_bytes(f"{s3_uri}/set/llava.json", json.dumps(LLAVA[:1]).encode())
    (sample,) = run_import(f"{s3_uri}/set/llava.json", folder / "train.jsonl")
    assert sample["image"] == {"<image_00>": f"{s3_uri}/set/red.png"}
    parquet.write_table(vqa(), folder / "vqa.parquet")
    storage.write_bytes(f"{s3_uri}/vqa/train-0.parquet", (folder / "vqa.parquet").read_bytes())
    assert len(run_import(f"{s3_uri}/vqa", folder / "train.jsonl")) == 2
