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
from minicpmv_finetune.data.other_formats import convert
from minicpmv_finetune.data.samples import Reject, Sample, SampleError, read_samples
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


def test_a_source_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    for source in ("no.json", "no*.json", "no"):
        with pytest.raises(UserError, match=r"not found|no file matches"):
            import_data(str(tmp_path / source), tmp_path / "new" / "train.jsonl")
    assert list(tmp_path.iterdir()) == []


def answered(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Color?"}, {"role": "assistant", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("item", "ignored"),
    [
        (openai(image_url(data_uri("red"))), ("messages.content.detail",)),
        (
            openai({"type": "image", "image": "red.png", "max_pixels": 9, "text": None}),
            ("messages.content.max_pixels",),
        ),
        (openai({"type": "text", "text": "Hi.", "cache_control": {"type": "x"}}), ("messages.content.cache_control",)),
        (answered({"type": "text", "text": "Red.", "loss": True}), ()),
        ({"system_prompt": "Be brief.", **openai("Hi.")}, ()),
    ],
)
def test_fields_of_parts_are_converted_or_counted(item: dict[str, Any], ignored: tuple[str, ...]) -> None:
    sample = convert(item, str)
    assert sample.ignored == ignored
    if "system_prompt" in item:
        assert sample.content["conversations"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (answered({"type": "text", "text": "Red.", "loss": False}), "a turn is trained whole"),
        (answered({"type": "text", "text": "Red.", "weight": 0}), "a turn is trained whole"),
        (openai({"type": "text", "text": "Color?", "image": "red.png"}), "has `image` beside its own content"),
        (openai({"type": "image", "image": "red.png", "text": "Color?"}), "has `text` beside its own content"),
        (openai({"type": "text", "text": "Color?", "video": "a.mp4"}), "has `video` beside its own content"),
        ({"system": "A.", "system_prompt": "B.", **openai("Hi.")}, "two system prompts"),
    ],
)
def test_fields_of_parts_that_would_be_lost_are_refused(item: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SampleError, match=sentence):
        convert(item, str)


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


ASK = {"role": "user", "content": "Color?"}
ANSWER = {"role": "assistant", "content": "Red."}
HUMAN, GPT = {"from": "human", "value": "Color?"}, {"from": "gpt", "value": "Red."}
ASKED = [("user", "Color?"), ("assistant", "Red.")]
BEFORE = [("user", "Hi."), ("assistant", "Hello.")]


@pytest.mark.parametrize(
    ("item", "turns", "ignored"),
    [
        (
            {"messages": [ASK, ANSWER], "objects": {"ref": [], "bbox": []}},
            [("user", ASK["content"]), ("assistant", ANSWER["content"])],
            "objects",
        ),
        # LLaMA-Factory
        ({"instruction": "Color?", "output": "Red."}, ASKED, ""),
        (
            {"instruction": "Color?", "input": "The sky.", "output": "Red."},
            [("user", "Color?\nThe sky."), ASKED[1]],
            "",
        ),
        (
            {"system": "Be brief.", "history": [["Hi.", "Hello."]], "instruction": "Color?", "output": "Red."},
            [("system", "Be brief."), *BEFORE, *ASKED],
            "",
        ),
        ({"conversations": [HUMAN, GPT], "system": "Be brief."}, [("system", "Be brief."), *ASKED], ""),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, ASKED, "rejected"),
        ({"conversations": [HUMAN, GPT], "kto_tag": True}, ASKED, ""),
        # ms-swift
        ({"query": "Color?", "response": "Red.", "history": [["Hi.", "Hello."]]}, [*BEFORE, *ASKED], ""),
        (
            {"system": "Be.", "conversation": [{"human": "Color?", "assistant": "Red."}]},
            [("system", "Be."), *ASKED],
            "",
        ),
        ({"messages": [ASK, ANSWER], "rejected_response": "Blue.", "channel": "a"}, ASKED, "rejected_response channel"),
        ({"messages": [ASK, ANSWER], "label": True}, ASKED, ""),
        # TRL
        ({"prompt": [ASK], "completion": [ANSWER]}, ASKED, ""),
        ({"prompt": "Color?", "completion": "Red.", "label": True}, ASKED, ""),
        ({"prompt": "Color?", "chosen": "Red.", "rejected": "Blue."}, ASKED, "rejected"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, ASKED, "rejected"),
        # OpenAI
        (
            {"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
            ASKED,
            "non_pre",
        ),
        ({"messages": [{**ASK, "name": "Ann"}, ANSWER]}, ASKED, "messages.name"),
        (
            {"messages": [ASK, {**ANSWER, "reasoning_content": "It is bright."}]},
            [ASKED[0], ("assistant", "<think>\nIt is bright.\n</think>\n\nRed.")],
            "",
        ),
        # Hugging Face datasets
        ({"Question": "Color?", "Answer": "Red.", "label": "color", "split": "a"}, ASKED, "label split"),
        (
            {"messages": [ASK, ANSWER], "images": [], "image_count": 0, "filename": "a.txt"},
            ASKED,
            "image_count filename",
        ),
    ],
    ids=str,
)
def test_fields_of_other_formats_are_converted_or_named(
    item: dict[str, Any], turns: list[tuple[str, str]], ignored: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "data.jsonl").write_text(json.dumps(item))
    (sample,) = run_import(folder / "data.jsonl", folder / "train.jsonl")
    assert [(turn["role"], turn["content"]) for turn in sample["conversations"]] == turns
    note = capsys.readouterr().err
    assert ("are ignored" in note) == bool(ignored)
    assert all(f"'{name}" in note for name in ignored.split())


@pytest.mark.parametrize(
    "field", [{"loss": False}, {"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}], ids=str
)
def test_answers_that_are_not_to_be_trained_stay_so(field: dict[str, Any], folder: Path) -> None:
    turns = [ASK, {**ANSWER, **field}, ASK, {**ANSWER, "loss": True, "weight": 1}]
    (folder / "data.jsonl").write_text(json.dumps({"messages": turns}))
    run_import(folder / "data.jsonl", folder / "train.jsonl")
    (sample,) = validate(folder / "train.jsonl", folder)
    assert [turn.loss for turn in sample.turns] == [True, False, True, True]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"messages": [ASK, ANSWER], "label": False}, "undesired_answer"),
        ({"prompt": "Color?", "completion": "Red.", "label": False}, "undesired_answer"),
        ({"conversations": [HUMAN, GPT], "kto_tag": False}, "undesired_answer"),
        ({"messages": [ASK, ANSWER], "weight": 0}, "nothing_supervised"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "unsupported"),
        ({"messages": [{**ASK, "loss": True}, ANSWER]}, "unsupported"),
        ({"messages": [ASK, ANSWER], "tools": "[{}]"}, "unsupported"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{}]}]}, "unsupported"),
        ({"messages": [ASK, {"role": "tool", "content": "7"}, ANSWER]}, "unsupported"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "f()"}, GPT]}, "unsupported"),
        ({"messages": [ASK, ANSWER], "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}}, "unsupported"),
        ({"messages": [ASK, ANSWER], "audios": ["a.wav"]}, "unsupported"),
        ({"messages": [ASK, ANSWER], "videos": ["a.mp4"]}, "video"),
        ({"messages": [ASK, {**ANSWER, "images": ["red.png"]}]}, "unsupported"),
        ({"question": "Color?", "options": ["Red.", "Blue."], "answer": "Red."}, "unsupported"),
        ({"instruction": "Color?", "context": "A sky.", "response": "Red."}, "unsupported"),
        ({"instruction": "Color?", "history": ["Hi."], "output": "Red."}, "schema"),
        ({"messages": [{"role": "system", "content": "a"}, ASK, ANSWER], "system": "b"}, "two_system_turns"),
        ({"messages": [ASK, ANSWER], "completion": "Blue."}, "schema"),
        ({"image": "red.png", "images": ["blue.png"], "messages": [ASK, ANSWER]}, "schema"),
        ({"coco_image_id": "17", "messages": [ASK, ANSWER]}, "schema"),
        ({"image": "red.png", "Image": "blue.png", "messages": [ASK, ANSWER]}, "doubled_key"),
        ({"messages": [[ASK, ANSWER]]}, "schema"),
        ({"prompt": "Color?", "completion": "Red.", "label": 0}, "undesired_answer"),
        ({"prompt": "Color?", "completion": "Red.", "label": "false"}, "undesired_answer"),
        ({"question": "Color?", "answer": "Red.", "label": False}, "undesired_answer"),
        ({"messages": [ASK, ANSWER], "loss_scale": 0}, "nothing_supervised"),
        ({"messages": [ASK, ANSWER], "train": False}, "nothing_supervised"),
        ({"messages": [ASK, {**ANSWER, "mask": True}]}, "unsupported"),
        ({"messages": [{**ASK, "image_path": "red.png"}, ANSWER]}, "unsupported"),
        ({"messages": [ASK, ANSWER], "screenshot": "red.png"}, "schema"),
        ({"prompt": "Color?", "query": "Of what?", "response": "Red."}, "unsupported"),
        ({"instruction": "Color?", "input": ["a"], "output": "Red."}, "schema"),
        ({"messages": [{"content": "Color?"}, ANSWER]}, "schema"),
        ({"instruction": "Color?", "output": ["Red.", "Blue."]}, "unsupported"),
    ],
    ids=str,
)
def test_what_would_be_trained_otherwise_than_meant_is_refused(
    item: dict[str, Any], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [LLAVA[2], item])))
    assert len(run_import(folder / "data.jsonl", folder / "train.jsonl")) == 1
    (reject,) = read_rejects(folder / "train.jsonl")
    assert (reject.reason, reject.message[-1]) == (reason, ".")
    assert f"1 rejected ({reason} 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image", "text", "names"),
    [
        (["red.png"], "Color?", ["red.png"]),
        ({"<image_00>": "red.png", "<image_01>": "blue.png"}, "<image_01> or <image_00>?", ["red.png", "blue.png"]),
        ({"<image>": "red.png"}, "<image> Color?", ["red.png"]),
    ],
    ids=str,
)
def test_this_projects_own_format_passes_through(image: Any, text: str, names: list[str], folder: Path) -> None:
    turns = [{"role": "user", "content": text}, {**ANSWER}, ASK, {**ANSWER, "loss": False}]
    item = {"image": image, "conversations": turns, "metric": "anls", "tags": ["a"], "answers": ["Crimson."]}
    (folder / "own.jsonl").write_text(json.dumps(item))
    run_import(folder / "own.jsonl", folder / "train.jsonl")
    (sample,) = validate(folder / "train.jsonl", folder)
    assert [Path(ref.uri).name for ref in sample.images] == names
    assert (sample.metric, sample.tags, sample.answers) == ("anls", ("a",), ("Crimson.",))
    if isinstance(image, dict):
        (direct,) = validate(folder / "own.jsonl", folder)
        assert direct.model_copy(update={"source": ""}) == sample.model_copy(update={"source": ""})


@pytest.mark.parametrize(
    "name", ["images", "img", "image_path", "imagePath", "image_url", "Image", "image_name", "pics", "file_name"]
)
def test_images_have_many_names(name: str, folder: Path) -> None:
    (folder / "data.jsonl").write_text(json.dumps({name: "red.png", "question": "Color?", "answer": "Red."}))
    (sample,) = run_import(folder / "data.jsonl", folder / "train.jsonl")
    assert sample["image"] == {"<image_00>": "red.png"}


def test_all_of_several_answers_are_accepted(folder: Path) -> None:
    (folder / "data.jsonl").write_text(json.dumps({"question": "Color?", "answer": ["Red.", "Crimson."]}))
    (sample,) = run_import(folder / "data.jsonl", folder / "train.jsonl")
    assert sample["answers"] == ["Red.", "Crimson."]
    assert sample["conversations"][1]["content"] == "Red."


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


def test_a_table_with_a_doubled_column_is_refused(folder: Path) -> None:
    parquet.write_table(pa.table([["a"], ["b"]], names=["image", "image"]), folder / "two.parquet")
    with pytest.raises(UserError, match=r"two\.parquet: has the column 'image' more than once"):
        import_data(str(folder / "two.parquet"), folder / "train.jsonl")


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
