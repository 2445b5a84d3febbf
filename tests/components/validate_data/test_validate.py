import base64
import html
import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minicpmv_finetune import storage
from minicpmv_finetune.components.validate_data.report import data_warnings
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, settings_from, validate_data
from minicpmv_finetune.data.samples import (
    DatasetInfo,
    Reject,
    Sample,
    open_image,
    read_image,
    read_info,
    read_samples,
)
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.outputs import MARK

Json = dict[str, Any]
TURNS = "conversations"
ASK: Json = {"role": "user", "content": "<image>\nWhat is it?"}
ASK_WORDS: Json = {"role": "user", "content": "What is it?"}
ANSWER: Json = {"role": "assistant", "content": "A square."}
TEXT_ONLY: Json = {"id": "fine", "conversations": [ASK_WORDS, ANSWER]}


def png(seed: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3)).save(file, "PNG")
    return file.getvalue()


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]


def png_that_claims(width: int, height: int) -> bytes:
    """An image of a few bytes whose header promises many pixels, as a decompression bomb does."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


class DataFolder:
    """A folder with images `a.png` and `b.png` in which data is written and validated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dataset = path / "dataset"
        self.rejects_file = path / "out" / "rejects.jsonl"
        (path / "a.png").write_bytes(png(1))
        (path / "b.png").write_bytes(png(2))

    def write(self, content: str | bytes | list[Any], name: str = "train.json") -> str:
        if isinstance(content, list):
            content = json.dumps(content)
        path = self.path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def check(self, content: str | bytes | list[Any], max_reject_ratio: float = 1.0, **settings: Any) -> DatasetInfo:
        """Validate, with a good sample as evaluation data."""
        return validate_data(
            self.write(content),
            self.write([TEXT_ONLY], "eval.json"),
            self.dataset,
            self.rejects_file,
            ValidationSettings(max_reject_ratio=max_reject_ratio, **settings),
        )

    @property
    def samples(self) -> list[Sample]:
        return list(read_samples(self.dataset, "train"))

    @property
    def rejects(self) -> list[Reject]:
        return [Reject.model_validate_json(line) for line in self.rejects_file.read_text().splitlines()]

    def rejected(self, sample: Any) -> Reject:
        """Why a sample among good ones is left out; the good ones stay."""
        self.check([TEXT_ONLY, sample, TEXT_ONLY])
        assert len(self.samples) == 2
        (reject,) = self.rejects
        assert (reject.file, reject.index) == (str(self.path / "train.json"), 1)
        return reject

    def accepted(self, sample: Json) -> Sample:
        self.check([sample])
        assert self.rejects == []
        return self.samples[0]


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return DataFolder(tmp_path)


# What is accepted, and its meaning


def test_an_image_goes_to_its_placeholder(folder: DataFolder) -> None:
    turn = {"role": "user", "content": "Look: <image> What is it?"}
    sample = folder.accepted({"id": "x", "image": "a.png", "conversations": [turn, ANSWER]})
    assert sample.turns[0].parts == ("Look: ", 0, " What is it?")
    assert sample.turns[1].parts == ("A square.",)
    (image,) = sample.images
    assert (image.uri, image.width, image.height) == (str(folder.path / "a.png"), 12, 8)
    assert (sample.id, sample.source, sample.index) == ("x", str(folder.path / "train.json"), 0)


def test_one_unnamed_image_without_a_placeholder_goes_first(folder: DataFolder) -> None:
    implicit = folder.accepted({"image": "a.png", "conversations": [ASK_WORDS, ANSWER, ASK_WORDS, ANSWER]})
    explicit = folder.accepted({"image": "a.png", "conversations": [ASK, ANSWER, ASK_WORDS, ANSWER]})
    assert implicit.turns == explicit.turns
    assert implicit.turns[0].parts[0] == 0


def test_one_unnamed_image_without_a_placeholder_goes_after_a_system_turn(folder: DataFolder) -> None:
    system = {"role": "system", "content": "Be brief."}
    sample = folder.accepted({"image": "a.png", "conversations": [system, ASK_WORDS, ANSWER]})
    assert [turn.parts[0] for turn in sample.turns] == ["Be brief.", 0, "A square."]


def test_the_text_decides_the_order_of_images_in_several_turns(folder: DataFolder) -> None:
    sample = folder.accepted(
        {
            "image": {"<image_00>": "a.png", "<image_01>": "b.png", "<image_02>": "a.png"},
            "conversations": [
                {"role": "user", "content": "<image_01>\n<image_00>\nWhich is red?"},
                ANSWER,
                {"role": "user", "content": "And this? <image_02>"},
                ANSWER,
            ],
        }
    )
    assert [Path(image.uri).name for image in sample.images] == ["a.png", "b.png", "a.png"]
    assert sample.turns[0].parts == (1, "\n", 0, "\nWhich is red?")
    assert sample.turns[2].parts == ("And this? ", 2)


def test_a_sample_without_images_is_accepted(folder: DataFolder) -> None:
    without_image: list[Json] = [{}, {"image": None}, {"image": ""}, {"image": {}}, {"video": None}]
    for fields in without_image:
        sample = folder.accepted({**fields, "conversations": [ASK_WORDS, ANSWER]})
        assert sample.images == ()


def test_an_image_without_text_is_a_question(folder: DataFolder) -> None:
    assert folder.accepted({"image": "a.png", "conversations": [{"role": "user", "content": ""}, ANSWER]})
    assert folder.samples[0].turns[0].parts == (0, "\n")


def test_ids_may_be_numbers_or_missing(folder: DataFolder) -> None:
    conversation = {"conversations": [ASK_WORDS, ANSWER]}
    folder.check([conversation, {"id": 0, **conversation}, {"id": "x", **conversation}])
    assert [sample.id for sample in folder.samples] == ["0", "0", "x"]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_images_of_every_mode_are_accepted(mode: str, folder: DataFolder) -> None:
    Image.new(mode, (5, 7)).save(folder.path / "odd.tiff")
    sample = folder.accepted({"image": "odd.tiff", "conversations": [ASK, ANSWER]})
    assert (sample.images[0].width, sample.images[0].height) == (5, 7)


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def rotated_jpeg(size: tuple[int, int] = (12, 8)) -> bytes:
    """An image that is red on the left as stored, and red at the top after rotation as EXIF says."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def red_level(image: Image.Image, position: tuple[int, int]) -> int:
    return int(np.asarray(image.convert("RGB"))[position[1], position[0], 0])


def test_a_jpeg_followed_by_a_second_view_is_one_image(folder: DataFolder) -> None:
    (folder.path / "phone.jpg").write_bytes(animated("MPO"))
    assert folder.accepted({"image": "phone.jpg", TURNS: [ASK, ANSWER]}).images


def test_noteworthy_properties_of_accepted_samples_are_counted(folder: DataFolder) -> None:
    Image.new("CMYK", (5, 7)).save(folder.path / "cmyk.tiff")
    Image.new("P", (5, 7)).save(folder.path / "palette.png")
    Image.new("RGBA", (5, 7)).save(folder.path / "glass.png")
    (folder.path / "rotated.jpg").write_bytes(rotated_jpeg())
    names = ("cmyk.tiff", "palette.png", "glass.png", "rotated.jpg", "a.png")
    pair = {"<image_00>": "a.png", "<image_01>": "b.png"}
    swapped = {"image": pair, TURNS: [{"role": "user", "content": "<image_01><image_00>"}, ANSWER]}
    info = folder.check([*({"image": name, TURNS: [ASK, ANSWER]} for name in names), swapped])
    assert folder.rejects == []
    assert info.noted == {"cmyk": 1, "palette": 1, "transparent": 1, "exif_rotated": 1, "order_by_text": 1}
    assert read_info(folder.dataset) == info


def test_images_are_rotated_as_exif_says_only_with_the_option(folder: DataFolder) -> None:
    (folder.path / "rotated.jpg").write_bytes(rotated_jpeg())
    samples = [{"image": "rotated.jpg", TURNS: [ASK, ANSWER]}]
    plain = folder.check(samples)
    (image_ref,) = folder.samples[0].images
    assert (image_ref.width, image_ref.height, image_ref.rotated) == (12, 8, False)
    assert red_level(open_image(image_ref), (0, 7)) > 200
    rotated = folder.check(samples, exif_transpose=True)
    (image_ref,) = folder.samples[0].images
    assert (image_ref.width, image_ref.height, image_ref.rotated) == (8, 12, True)
    image = open_image(image_ref)
    assert image.size == (8, 12)
    assert red_level(image, (7, 0)) > 200
    assert red_level(image, (7, 11)) < 50
    assert (plain.exif_transpose, rotated.exif_transpose) == (False, True)
    assert plain.fingerprint != rotated.fingerprint
    assert any("the server of the model must rotate them too" in warning for warning in data_warnings(rotated))


def test_data_options_are_checked() -> None:
    assert settings_from({"seed": 1, "exif_transpose": True}) == ValidationSettings(seed=1, exif_transpose=True)
    for options in ({"exif": True}, {"eval_fraction": 1.5}, {"exif_transpose": "perhaps"}):
        with pytest.raises(UserError, match=f"data_options: {next(iter(options))}: "):
            settings_from(options)


# Addresses of images


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def test_images_may_be_members_of_tar_archives(folder: DataFolder) -> None:
    write_archive(folder.path / "0.tar", {"./x/a.png": png(1), f"{'long/' * 60}b.png": png(2)})
    samples = [{"image": f"0.tar!{name}", TURNS: [ASK, ANSWER]} for name in ("x/a.png", f"./{'long/' * 60}b.png")]
    folder.check(samples)
    assert folder.rejects == []
    for sample, seed in zip(folder.samples, (1, 2), strict=True):
        assert read_image(sample.images[0]) == png(seed)
    write_archive(folder.path / "0.tar", {"x/a.png": png(3)})
    with pytest.raises(UserError, match=r"0\.tar!x/a\.png: changed since it was validated"):
        open_image(folder.samples[0].images[0])


@pytest.mark.parametrize(
    ("reference", "reason", "sentence"),
    [
        ("0.tar!no.png", "image_missing", "0.tar!no.png: the archive contains no such file"),
        ("0.tar!link.png", "image_missing", "contains no such file"),
        ("none.tar!a.png", "image_missing", "none.tar: not found"),
        ("bad.tar!a.png", "image_missing", "bad.tar: not a readable tar file"),
        ("0.tar!../a.png", "image_refused", "leads out of the archive"),
        ("0.tar!/etc/passwd", "image_refused", "leads out of the archive"),
        ("0.tar!x/../../a.png", "image_refused", "leads out of the archive"),
        ("0.tar.gz!a.png", "image_refused", "compressed archive"),
        ("https://e.org/0.tar!a.png", "image_refused", "web addresses are refused"),
        ("data:image/png,%00", "image_unreadable", "only data:image/…;base64"),
        ("data:image/png;base64,!!!!", "image_unreadable", "not valid Base64"),
        ("data:image/png;base64,AAAA", "image_unreadable", "not a readable image"),
        ("moving.gif", "image_animated", "several frames"),
        ("moving.png", "image_animated", "several frames"),
        ("moving.tiff", "image_animated", "several frames"),
        ("deep.png", "image_depth", "more than 8 bits"),
        ("deep.tiff", "image_depth", "more than 8 bits"),
        ("page.eps", "image_unreadable", "not a readable image"),
    ],
)
def test_an_image_that_cannot_be_used_is_rejected_with_its_code(
    reference: str, reason: str, sentence: str, folder: DataFolder
) -> None:
    write_archive(folder.path / "0.tar", {"a.png": png(1)})
    (folder.path / "bad.tar").write_bytes(b"words" * 1000)
    for name, kind in {"moving.gif": "GIF", "moving.png": "PNG", "moving.tiff": "TIFF"}.items():
        (folder.path / name).write_bytes(animated(kind))
    Image.new("I;16", (4, 4), 40_000).save(folder.path / "deep.png")
    Image.new("F", (4, 4), 0.5).save(folder.path / "deep.tiff")
    Image.new("RGB", (4, 4)).save(folder.path / "page.eps")
    reject = folder.rejected({"image": reference, TURNS: [ASK, ANSWER]})
    assert reject.reason == reason
    assert sentence in reject.message


def test_an_image_may_be_a_data_uri(folder: DataFolder) -> None:
    uri = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
    sample = folder.accepted({"image": uri, TURNS: [ASK, ANSWER]})
    assert read_image(sample.images[0]) == png(1)
    assert open_image(sample.images[0]).size == (12, 8)
    broken = folder.rejected({"image": f"{uri[:-400]}{'A' * 4000}", TURNS: [ASK, ANSWER]})
    assert len(broken.message) < 300, "the message does not repeat the image"


def test_patterns_name_many_files_on_disk_and_in_object_storage(s3_uri: str, folder: DataFolder) -> None:
    for number in range(3):
        line = json.dumps({"id": str(number), "conversations": [ASK_WORDS, ANSWER]})
        folder.write(line, f"part-{number}.jsonl")
        storage.write_bytes(f"{s3_uri}/set/part-{number}.jsonl", line.encode())
        storage.write_bytes(f"{s3_uri}/set/deeper/part-{number}.jsonl", b"does not match")
    for pattern in (str(folder.path / "part-[01].json*"), f"{s3_uri}/set/part-[01].json*"):
        validate_data(pattern, pattern, folder.dataset, folder.rejects_file, ValidationSettings(1.0))
        assert [sample.id for sample in folder.samples] == ["0", "1"]
        assert [sample.source[-12:] for sample in folder.samples] == ["part-0.jsonl", "part-1.jsonl"]
    for pattern in (str(folder.path / "no-*.json"), f"{s3_uri}/set/no-*.json"):
        with pytest.raises(UserError, match="no file matches this pattern"):
            validate_data(pattern, "", folder.dataset, folder.rejects_file, ValidationSettings())


def test_many_samples_keep_their_order_through_the_pool(folder: DataFolder) -> None:
    samples = [
        {"id": str(number), "image": "a.png" if number % 3 else "no.png", TURNS: [ASK, ANSWER]} for number in range(200)
    ]
    folder.check(samples)
    assert [sample.index for sample in folder.samples] == [number for number in range(200) if number % 3]
    assert [reject.index for reject in folder.rejects] == list(range(0, 200, 3))


def test_an_incomplete_array_ends_the_step_and_none_of_it_is_accepted(folder: DataFolder) -> None:
    text = json.dumps([TEXT_ONLY] * 100, indent=1)
    with pytest.raises(UserError, match=r"train\.json, line \d+: invalid JSON at line \d+, column"):
        folder.check(text[:-20])
    assert [reject.reason for reject in folder.rejects] == ["invalid_json"]
    assert not folder.dataset.exists()


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        (json.dumps([{"id": "x", "image": "no.png", TURNS: [ASK, ANSWER]}]), "1 image_missing"),
        (json.dumps([TEXT_ONLY, {"id": "x", "image": "no.png", TURNS: [ASK, ANSWER]}, {}]), "1 image_missing, 1 "),
        (json.dumps([TEXT_ONLY] * 100, indent=1)[:-20], "1 invalid_json"),
    ],
    ids=["nothing left", "too many", "incomplete"],
)
def test_data_that_is_refused_has_a_report_too(
    folder: DataFolder, capsys: pytest.CaptureFixture[str], text: str, reasons: str
) -> None:
    report = folder.path / "data-report.html"
    with pytest.raises(UserError) as refused:
        validate_data(folder.write(text), "", folder.dataset, folder.rejects_file, ValidationSettings(), report)
    page = report.read_text()
    assert "The data is refused" in page
    assert html.escape(str(refused.value)[:60], quote=False) in page
    assert reasons in capsys.readouterr().err
    assert not folder.dataset.exists()


def as_array(samples: list[Json]) -> str:
    return json.dumps(samples, indent=1)


def as_lines(samples: list[Json]) -> str:
    return "\n\n".join(json.dumps(sample) for sample in samples) + "\r\n"


def as_data(samples: list[Json]) -> str:
    return json.dumps({"data": samples, "version": 1}, indent=1)


def with_byte_order_mark(samples: list[Json]) -> str:
    return f"\ufeff{json.dumps(samples)}"


@pytest.mark.parametrize("write", [as_array, as_lines, as_data, with_byte_order_mark])
@pytest.mark.parametrize("number", [1, 3])
def test_each_file_format_is_read(write: Callable[[list[Json]], str], number: int, folder: DataFolder) -> None:
    folder.check(write([{"id": str(index), "conversations": [ASK_WORDS, ANSWER]} for index in range(number)]))
    assert [sample.id for sample in folder.samples] == [str(index) for index in range(number)]
    assert folder.rejects == []


def test_a_line_may_contain_characters_that_other_programs_treat_as_line_breaks(folder: DataFolder) -> None:
    answer = {"role": "assistant", "content": "one\u2028two\x85three"}
    line = json.dumps({"conversations": [ASK_WORDS, answer]}, ensure_ascii=False)
    folder.check(f"{line}\n{line}\n")
    assert [sample.turns[1].text for sample in folder.samples] == ["one\u2028two\x85three"] * 2


# What is rejected

BAD_SAMPLES: dict[str, tuple[Any, str, str]] = {
    "missing image": (
        {"image": "no.png", TURNS: [ASK, ANSWER]},
        "image_missing",
        r"no\.png: not found",
    ),
    "folder as image": ({"image": ".", TURNS: [ASK, ANSWER]}, "image_missing", "is a folder"),
    "endless name": ({"image": "a" * 9999, TURNS: [ASK, ANSWER]}, "image_missing", "longer than a path can be"),
    "null in a name": ({"image": "a\0.png", TURNS: [ASK, ANSWER]}, "image_missing", "null character"),
    "image is no image": (
        {"image": "text.png", TURNS: [ASK, ANSWER]},
        "image_unreadable",
        "text.png: not a readable",
    ),
    "empty image": ({"image": "empty.png", TURNS: [ASK, ANSWER]}, "image_unreadable", "empty.png: not a readable"),
    "truncated JPEG": ({"image": "half.jpg", TURNS: [ASK, ANSWER]}, "image_unreadable", "half.jpg: not a .*truncated"),
    "decompression bomb": ({"image": "bomb.png", TURNS: [ASK, ANSWER]}, "decompression_bomb", "bomb.png: more than"),
    "larger bomb": ({"image": "bomb2.png", TURNS: [ASK, ANSWER]}, "decompression_bomb", "bomb2.png: more than"),
    "web address": (
        {"image": "https://example.org/a.png", TURNS: [ASK, ANSWER]},
        "image_refused",
        "https://example.org/a.png: .*web addresses are refused",
    ),
    "other scheme": ({"image": "ftp://host/a.png", TURNS: [ASK, ANSWER]}, "image_refused", "only local paths, s3://"),
    "second image missing": (
        {
            "image": {"<image_00>": "a.png", "<image_01>": "no.png"},
            TURNS: [{"role": "user", "content": "<image_00><image_01>"}, ANSWER],
        },
        "image_missing",
        "no.png",
    ),
    "video": ({"video": "a.mp4", TURNS: [ASK_WORDS, ANSWER]}, "video", "`video`"),
    "video in another schema": ({"video": "a.mp4", TURNS: [{"from": "human", "value": "?"}]}, "video", "`video`"),
    "no turns": ({TURNS: []}, "roles", "no turn"),
    "system alone": ({TURNS: [{"role": "system", "content": "Hi."}]}, "roles", "no turn"),
    "answer first": ({TURNS: [ANSWER, ASK_WORDS]}, "roles", "turn 0 has the role 'assistant' where 'user'"),
    "two questions": ({TURNS: [ASK_WORDS, ASK_WORDS, ANSWER]}, "roles", "turn 1 has the role 'user'"),
    "unknown role": ({TURNS: [ASK_WORDS, {"role": "gpt", "content": "A."}]}, "roles", "turn 1 has the role 'gpt'"),
    "two system turns": (
        {TURNS: [{"role": "system", "content": "Hi."}] * 2 + [ASK_WORDS, ANSWER]},
        "two_system_turns",
        "more than one system turn",
    ),
    "question last": ({TURNS: [ASK_WORDS, ANSWER, ASK_WORDS]}, "roles", "the last turn is the user's"),
    "mark of a video": (
        {TURNS: [{**ASK, "content": "<video>\nWhat?"}, ANSWER]},
        "video",
        "marks <video>, which is not",
    ),
    "mark of a sound": ({TURNS: [{**ASK, "content": "Hear <audio>"}, ANSWER]}, "unsupported", "marks <audio>, which"),
    "placeholder without image": ({TURNS: [ASK, ANSWER]}, "placeholder_without_image", "the text contains <image>"),
    "numbered placeholder for an unnamed image": (
        {"image": "a.png", TURNS: [{"role": "user", "content": "<image_00>"}, ANSWER]},
        "placeholder_without_image",
        "<image_00>",
    ),
    "one placeholder too many": (
        {"image": {"<image_00>": "a.png"}, TURNS: [{"role": "user", "content": "<image_00><image_01>"}, ANSWER]},
        "placeholder_without_image",
        "<image_01>",
    ),
    "doubled placeholder": (
        {"image": "a.png", TURNS: [{"role": "user", "content": "<image><image>"}, ANSWER]},
        "placeholder_doubled",
        "<image> occurs 2 times",
    ),
    "placeholder doubled over turns": ({"image": "a.png", TURNS: [ASK, ANSWER] * 2}, "placeholder_doubled", "2 times"),
    "named image that no turn mentions": (
        {"image": {"<image_00>": "a.png", "<image_01>": "b.png"}, TURNS: [{**ASK, "content": "<image_00>"}, ANSWER]},
        "placeholder_missing",
        "no turn mentions <image_01>",
    ),
    "one named image that no turn mentions": (
        {"image": {"<image_00>": "a.png"}, TURNS: [ASK_WORDS, ANSWER]},
        "placeholder_missing",
        "no turn mentions <image_00>",
    ),
    "name that is no placeholder": (
        {"image": {"first": "a.png"}, TURNS: [{"role": "user", "content": "first"}, ANSWER]},
        "placeholder_name",
        "'first' is no placeholder",
    ),
    "placeholder in the answer": (
        {"image": "a.png", TURNS: [ASK_WORDS, {"role": "assistant", "content": "<image>"}]},
        "placeholder_in_answer",
        r"turn 1 \(assistant\)",
    ),
    "empty answer": (
        {TURNS: [ASK_WORDS, {"role": "assistant", "content": ""}]},
        "empty_answer",
        r"turn 1 \(assistant\)",
    ),
    "blank answer": ({TURNS: [ASK_WORDS, {"role": "assistant", "content": " \n"}]}, "empty_answer", "has no text"),
    "empty answer before another": (
        {TURNS: [ASK_WORDS, {"role": "assistant", "content": ""}, ASK_WORDS, ANSWER]},
        "empty_answer",
        "turn 1",
    ),
    "empty question": ({TURNS: [{"role": "user", "content": ""}, ANSWER]}, "empty_turn", r"turn 0 \(user\)"),
    "no conversations": ({"image": "a.png"}, "schema", "conversations: Field required"),
    "content is a number": (
        {TURNS: [ASK_WORDS, {"role": "assistant", "content": 7}]},
        "schema",
        "conversations.1.content",
    ),
    "list of images": ({"image": ["a.png"] * 2, TURNS: [ASK, ANSWER]}, "schema", "image: should be an image, or an"),
    "image that is a number": ({"image": 7, TURNS: [ASK, ANSWER]}, "schema", "image: .*, not a number"),
    "named image that is null": ({"image": {"<image>": None}, TURNS: [ASK, ANSWER]}, "schema", "image"),
    "no object": ("words", "schema", "the sample is text, not an object"),
    "null": (None, "schema", "the sample is null, not an object"),
    "nested array": ([TEXT_ONLY], "schema", "the sample is an array, not an object"),
    "turn that is text": ({TURNS: ["Hi."]}, "schema", r"conversations\.0: should be an object, not text"),
    "turns that are an object": ({TURNS: {"role": "user"}}, "schema", "conversations: should be an array, not an obj"),
    "loss that is a number": ({TURNS: [ASK_WORDS, {**ANSWER, "loss": 0}]}, "schema", "true or false, not a number"),
    "loss of a question": ({TURNS: [{**ASK_WORDS, "loss": True}, ANSWER]}, "schema", r"turn 0 \(user\) has loss true"),
    "no loss at all": ({TURNS: [ASK_WORDS, {**ANSWER, "loss": False}]}, "nothing_supervised", "every answer"),
    "half a character": (
        {"id": "\ud83d", TURNS: [ASK_WORDS, {"role": "assistant", "content": "\ud83d"}]},
        "invalid_unicode",
        "surrogate pair",
    ),
}


FOREIGN_FIELDS: list[Json] = [
    *({name: "a.png"} for name in ("images", "img", "image_path", "image_url", "Image", "file_name", "image ")),
    *({name: ["a.png"]} for name in ("images", "image_urls", "imgs")),
    *({name: "17"} for name in ("image_id", "coco_image", "imageBase64", "photo_of_front", "pics")),
    *({name: "clip"} for name in ("videos", "audio", "audios", "audio_path", "audio_url")),
    *({name: "Be brief."} for name in ("system", "chosen", "rejected", "rejected_response", "reasoning_content")),
    *({name: [{}]} for name in ("messages", "history", "tools", "objects", "functions")),
    *({name: False} for name in ("label", "kto_tag", "weight", "loss")),
    {"weight": 0},
    {"conversation": TEXT_ONLY[TURNS], TURNS: None},
    {"messages": TEXT_ONLY[TURNS], TURNS: None},
    {"query": "What?", "response": "That.", TURNS: None},
    {"instruction": "What?", "output": "That.", TURNS: None},
    {"Conversations": TEXT_ONLY[TURNS], TURNS: None},
    {TURNS: [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]},
    *({TURNS: [ASK_WORDS, {**ANSWER, **field}]} for field in ({"weight": 0}, {"train": False}, {"Content": "Else."})),
    *({TURNS: [ASK_WORDS, {**ANSWER, name: [{}]}]} for name in ("tool_calls", "images", "reasoning_content")),
]


@pytest.mark.parametrize("fields", FOREIGN_FIELDS, ids=str)
def test_fields_of_other_formats_are_refused_and_not_lost(fields: Json, folder: DataFolder) -> None:
    reject = folder.rejected({**TEXT_ONLY, **fields})
    assert reject.reason in ("other_format", "video")
    if reject.reason == "other_format":
        named = next(name for name in fields if fields[name] is not None)
        assert f"`{named}" in reject.message
        assert "minicpmv-finetune import-data" in reject.message


def test_fields_without_a_meaning_are_counted_and_named(folder: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    remark = {
        "category": "x",
        "image_count": 0,
        "label": "cat",
        "weight": 3,
        "images": [],
        "system": None,
        "question": "What?",
    }
    info = folder.check(
        [{**TEXT_ONLY, **remark}, {**TEXT_ONLY, "category": "y", TURNS: [ASK_WORDS, {**ANSWER, "name": 1}]}]
    )
    assert info.ignored_fields == {
        **{"category": 2, "conversations.name": 1, "image_count": 1, "label": 1, "question": 1, "weight": 1}
    }
    assert "note: fields without a meaning here are ignored: 'category' (2), 'conv" in capsys.readouterr().err
    shown = folder.accepted({"image": "a.png", "image_url": "https://e.org/a.png", TURNS: [ASK, ANSWER]})
    assert len(shown.images) == 1


@pytest.mark.parametrize("text", ["Write <video><source src='a.mp4'></video>", "What does <audio> ... </audio> do?"])
def test_a_web_pages_tag_is_no_mark_of_a_video(text: str, folder: DataFolder) -> None:
    folder.check([{TURNS: [{"role": "user", "content": text}, {**ANSWER, "content": "A page with <video>."}]}])
    assert folder.rejects == []


def test_a_source_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        validate_data(
            str(tmp_path / "no.json"),
            "",
            tmp_path / "new" / "ds",
            tmp_path / "new" / "rejects.jsonl",
            ValidationSettings(),
        )
    assert list(tmp_path.iterdir()) == []


def test_many_different_fields_do_not_fill_the_memory(folder: DataFolder) -> None:
    info = folder.check([{**TEXT_ONLY, f"field {number}": 1} for number in range(1100)])
    assert len(info.ignored_fields) == 1001
    assert info.ignored_fields["…"] == 100


def test_a_set_without_images_is_noted(folder: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    info = folder.check([TEXT_ONLY, TEXT_ONLY])
    assert info.with_images == {"train": 0, "eval": 0}
    assert "warning: none of the 2 training samples shows an image" in capsys.readouterr().err
    info = folder.check([TEXT_ONLY, {"image": "a.png", TURNS: [ASK, ANSWER]}])
    assert info.with_images == {"train": 1, "eval": 0}
    assert "training samples shows" not in capsys.readouterr().err


def test_a_list_of_one_image_is_this_image(folder: DataFolder) -> None:
    one, listed = (folder.accepted({"image": image, TURNS: [ASK, ANSWER]}) for image in ("a.png", ["a.png"]))
    assert one == listed


def test_nulls_say_nothing(folder: DataFolder) -> None:
    nulls = dict.fromkeys(("id", "image", "metric", "tags", "answers", "system", "images"))
    sample = folder.accepted({**nulls, TURNS: [ASK_WORDS, {**ANSWER, "loss": None, "weight": None}]})
    assert (sample.tags, sample.answers, sample.metric, sample.turns[1].loss) == ((), (), None, True)


def test_answers_may_have_no_loss(folder: DataFolder) -> None:
    plain = {TURNS: [ASK_WORDS, ANSWER, ASK_WORDS, ANSWER]}
    partly = {TURNS: [ASK_WORDS, {**ANSWER, "loss": False}, ASK_WORDS, {**ANSWER, "loss": True}]}
    info = folder.check([plain, partly])
    assert [[turn.loss for turn in sample.turns] for sample in folder.samples] == [
        [True] * 4,
        [True, False, True, True],
    ]
    assert info.noted == {"untrained_answer": 1}, "the two samples are not duplicates"


def test_reasoning_before_the_last_answer_is_counted(folder: DataFolder) -> None:
    reasoning = {**ANSWER, "content": "<think>a gap</think>3"}
    only_last = {TURNS: [ASK_WORDS, ANSWER, ASK_WORDS, reasoning]}
    untrained = {TURNS: [ASK_WORDS, {**reasoning, "loss": False}, ASK_WORDS, ANSWER]}
    info = folder.check([only_last, untrained, {TURNS: [ASK_WORDS, reasoning, ASK_WORDS, reasoning]}])
    assert info.noted["early_reasoning"] == 1


def test_a_sample_with_a_doubled_key_is_rejected(folder: DataFolder) -> None:
    bad = '{"id": "twice", "image": {"<image>": "a.png", "<image>": "b.png"}, "conversations": []}'
    for text in (f"[{json.dumps(TEXT_ONLY)}, {bad}]", f"{json.dumps(TEXT_ONLY)}\n{bad}"):
        folder.check(text)
        (reject,) = folder.rejects
        assert (reject.reason, reject.index, reject.id) == ("doubled_key", 1, "twice")
        assert "'<image>'" in reject.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer; .*git lfs pull"),
        (b"\n<!DOCTYPE HTML><html>404", "a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*convert it to JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0heic", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a video"),
        (b"%PDF-1.7", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", "PostScript"),
        (b"<svg xmlns=''/>", "an SVG drawing"),
        (b"\x0a\x05\x01\x08" + bytes(200), r"its first bytes b'\\n\\x05"),
        (b"404: Not Found", "it is text, which begins with '404: Not Found'; download the image again"),
        (b'{"message":\n "Not Found"}', 'it is text, which begins with .*"Not Found"'),
        ("未找到".encode() * 90, "it is text, which begins with '未找到未"),
        (b"RIFX\xff\xfe\x00 words", "are of no known format"),
    ],
)
def test_what_a_file_has_in_place_of_an_image_is_named(content: bytes, words: str, folder: DataFolder) -> None:
    (folder.path / "photo.jpg").write_bytes(content)
    reject = folder.rejected({"image": "photo.jpg", TURNS: [ASK, ANSWER]})
    assert reject.reason == "image_unreadable"
    assert re.search(rf"photo\.jpg: not a readable image: .*{words}", reject.message)
    assert " object at " not in reject.message, "the message is the same in each run"


def test_pillow_rotates_a_tiff_itself(folder: DataFolder) -> None:
    image = Image.open(io.BytesIO(rotated_jpeg()))
    image.save(folder.path / "rotated.tiff", exif=image.getexif())
    for exif_transpose in (False, True):
        info = folder.check([{"image": "rotated.tiff", TURNS: [ASK, ANSWER]}], exif_transpose=exif_transpose)
        (ref,) = folder.samples[0].images
        assert (ref.width, ref.height, ref.rotated) == (8, 12, False)
        assert red_level(open_image(ref), (7, 0)) > 200
        assert "exif_rotated" not in info.noted


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_sample_is_rejected_with_its_reason(
    case: str, folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, reason, sentence = BAD_SAMPLES[case]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for name, content in {
        "text.png": b"words",
        "empty.png": b"",
        "half.jpg": truncated_jpeg(),
        "bomb.png": png_that_claims(150, 100),  # Pillow only warns up to twice its limit
        "bomb2.png": png_that_claims(1000, 1000),
    }.items():
        (folder.path / name).write_bytes(content)
    reject = folder.rejected(sample)
    assert reject.reason == reason
    assert len(reject.message) < 500
    assert reject.message.endswith((".", "…"))
    assert re.search(sentence, reject.message)


def test_a_reject_keeps_the_samples_id(folder: DataFolder) -> None:
    assert folder.rejected({"id": "the-bad-one", TURNS: []}).id == "the-bad-one"
    assert folder.rejected({"id": 17, TURNS: []}).id == "17"


@pytest.mark.parametrize("damage", ["header", "middle", "noise"])
def test_no_damage_to_an_image_stops_the_step(damage: str, folder: DataFolder) -> None:
    """Decoders raise many kinds of error for damaged bytes; each error only rejects its image."""
    chance = random.Random(0)
    samples = []
    for number, kind in enumerate(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO"] * 10):
        file = io.BytesIO()
        Image.frombytes("RGB", (32, 32), chance.randbytes(32 * 32 * 3)).save(file, kind)
        content = bytearray(file.getvalue())
        place = {"header": (4, 40), "middle": (40, len(content)), "noise": (0, len(content))}[damage]
        for _ in range(8):
            content[chance.randrange(*place) % len(content)] = chance.randrange(256)
        (folder.path / f"damaged-{number}").write_bytes(content)
        samples.append({"image": f"damaged-{number}", TURNS: [ASK, ANSWER]})
    folder.check([TEXT_ONLY, *samples])
    assert len(folder.samples) + len(folder.rejects) == 81
    assert {reject.reason for reject in folder.rejects} <= {"image_unreadable", "decompression_bomb"}


# Files that cannot be used


@pytest.mark.parametrize("content", ["", " \n\n", "[]", "[\n]", '{"data": []}', "\ufeff"])
def test_an_empty_file_is_reported(content: str, folder: DataFolder) -> None:
    with pytest.raises(UserError, match=r"no usable train sample is left.*train\.json.*empty"):
        folder.check(content)
    (reject,) = folder.rejects
    assert reject.reason == "empty_file"
    assert not folder.dataset.exists()


@pytest.mark.parametrize("write", [as_array, as_data])
def test_invalid_json_in_an_array_is_reported_by_its_line(
    write: Callable[[list[Json]], str], folder: DataFolder
) -> None:
    lines = write([TEXT_ONLY, TEXT_ONLY]).splitlines()
    broken = next(number for number, line in enumerate(lines) if '"id"' in line) + 1
    lines[broken - 1] = lines[broken - 1].replace(":", "")
    with pytest.raises(UserError, match=f"train.json, line {broken}: invalid JSON at line {broken}, column"):
        folder.check("\n".join(lines))
    (reject,) = folder.rejects
    assert (reject.reason, reject.line, reject.index) == ("invalid_json", broken, None)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_invalid_json_in_a_line_is_reported_and_the_other_lines_are_accepted(broken: int, folder: DataFolder) -> None:
    lines = [json.dumps(TEXT_ONLY)] * 3
    lines[broken] = lines[broken][:-3]
    folder.check("\n\n".join(lines))
    (reject,) = folder.rejects
    assert (reject.reason, reject.index, reject.line) == ("invalid_json", broken, 2 * broken + 1)
    assert f"line {2 * broken + 1}, column" in reject.message
    assert [sample.index for sample in folder.samples] == [number for number in range(3) if number != broken]


@pytest.mark.parametrize("content", ["[" * 100_000, f"[{'1' * 5000}]"], ids=["deep", "long number"])
def test_json_beyond_pythons_limits_is_invalid_too(content: str, folder: DataFolder) -> None:
    with pytest.raises(UserError, match="invalid JSON at line 1"):
        folder.check(content)
    assert folder.rejects[0].reason == "invalid_json"
    line = json.dumps(TEXT_ONLY)
    folder.check(f"{line}\n{content}\n{line}\n")
    assert [(reject.reason, reject.line) for reject in folder.rejects] == [("invalid_json", 2)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[\xff\xfe]", "not UTF-8"),
        (b'"words"', "contains text, not an array"),
        (b"7", "contains a number, not an array"),
    ],
)
def test_a_file_of_another_kind_is_refused(content: bytes, sentence: str, folder: DataFolder) -> None:
    with pytest.raises(UserError, match=f"train.json: {sentence}"):
        folder.check(content)


def test_a_missing_file_is_refused(folder: DataFolder) -> None:
    uri = str(folder.path / "no.json")
    with pytest.raises(UserError, match=r"no\.json: not found"):
        validate_data(uri, "", folder.dataset, folder.rejects_file, ValidationSettings())
    with pytest.raises(UserError, match="web addresses are refused"):
        validate_data("https://e.org/t.json", "", folder.dataset, folder.rejects_file, ValidationSettings())


def test_a_folder_in_place_of_data_is_refused(s3_uri: str, folder: DataFolder) -> None:
    storage.write_bytes(f"{s3_uri}/set/train.json", b"[]")
    (folder.path / "images").mkdir(exist_ok=True)
    for uri in (s3_uri, f"{s3_uri}/set", f"{s3_uri}/set/", str(folder.path / "images")):
        with pytest.raises(UserError, match=r"is a folder; name its data files, such as '.*/\*\.jsonl'"):
            validate_data(uri, "", folder.dataset, folder.rejects_file, ValidationSettings())


# How many may be rejected


def test_more_rejects_than_the_ratio_allows_end_the_step(folder: DataFolder) -> None:
    bad = {"id": "bad", TURNS: []}
    with pytest.raises(UserError, match=r"2 of 20 samples \(10.0%\).*max_reject_ratio 5.0%.*sample 17: the convers"):
        folder.check([TEXT_ONLY] * 17 + [bad] * 2, max_reject_ratio=0.05)
    assert len(folder.rejects) == 2, "the list is written although the step fails"
    assert not folder.dataset.exists()
    folder.check([TEXT_ONLY] * 17 + [bad] * 2, max_reject_ratio=0.1)
    assert read_info(folder.dataset).rejected == {"roles": 2}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_split_without_samples_ends_the_step_at_any_ratio(split: str, folder: DataFolder) -> None:
    good: list[Json] = [TEXT_ONLY] * 99
    bad: list[Json] = [{TURNS: []}]
    train = folder.write(bad if split == "train" else good, "train.json")
    evaluation = folder.write(bad if split == "eval" else good, "eval.json")
    with pytest.raises(UserError, match=f"no usable {split} sample is left, 1 were rejected.*{split}.json, sample 0"):
        validate_data(train, evaluation, folder.dataset, folder.rejects_file, ValidationSettings(max_reject_ratio=1.0))
    assert len(folder.rejects) == 1
    assert not folder.dataset.exists()


# The dataset as a whole


def many(folder: DataFolder, number: int) -> list[Json]:
    """Pairs of neighboring samples that show the same image."""
    for image in range(number // 2):
        (folder.path / f"{image}.png").write_bytes(png(image + 10))
    return [{"id": str(n), "image": f"{n // 2}.png", TURNS: [ASK, ANSWER]} for n in range(number)]


def split(folder: DataFolder, samples: list[Json], **settings: Any) -> tuple[set[str], set[str]]:
    """The ids of the training and the evaluation samples when no evaluation data is given."""
    uri = folder.write(samples)
    validate_data(uri, "", folder.dataset, folder.rejects_file, ValidationSettings(**settings))
    train, evaluation = (read_samples(folder.dataset, name) for name in ("train", "eval"))
    return {sample.id for sample in train}, {sample.id for sample in evaluation}


def test_evaluation_data_is_split_off_by_image(folder: DataFolder) -> None:
    samples = many(folder, 200)
    train, evaluation = split(folder, samples, eval_fraction=0.2)
    assert train | evaluation == {sample["id"] for sample in samples}
    assert 20 <= len(evaluation) <= 60
    assert {int(number) // 2 for number in train}.isdisjoint({int(number) // 2 for number in evaluation})
    assert split(folder, samples, eval_fraction=0.2, seed=1)[1] != evaluation
    # Another order or more samples do not move a sample to the other split.
    assert split(folder, samples[::-1], eval_fraction=0.2) == (train, evaluation)
    assert split(folder, many(folder, 240), eval_fraction=0.2)[1] >= evaluation


def test_samples_that_share_images_stay_in_one_split(folder: DataFolder) -> None:
    for number in range(60):
        (folder.path / f"{number}.png").write_bytes(png(number + 10))
    pair: Json = {TURNS: [{"role": "user", "content": "<image_00><image_01>"}, ANSWER]}
    # Chains of three samples: 0-1, 1-2, 2-3; 4-5, …
    samples = [
        {"id": f"{chain}.{link}", "image": {"<image_00>": f"{first}.png", "<image_01>": f"{first + 1}.png"}, **pair}
        for chain in range(15)
        for link, first in enumerate(range(4 * chain, 4 * chain + 3))
    ]
    train, evaluation = split(folder, samples, eval_fraction=0.3)
    assert {name.split(".")[0] for name in train}.isdisjoint(name.split(".")[0] for name in evaluation)
    assert evaluation
    assert split(folder, samples[::-1], eval_fraction=0.3) == (train, evaluation)
    assert read_info(folder.dataset).noted.get("leaked_equal") is None


def test_a_group_of_most_samples_is_trained_on(folder: DataFolder) -> None:
    common = [{"id": f"c{number}", "image": "a.png", TURNS: [ASK, ANSWER]} for number in range(30)]
    for seed in range(4):
        train, evaluation = split(folder, [*common, *many(folder, 28)], eval_fraction=0.5, seed=seed)
        assert train >= {sample["id"] for sample in common}
        assert evaluation
    with pytest.raises(UserError, match=r"30 of them share images"):
        split(folder, common)


def test_no_evaluation_data_is_allowed(folder: DataFolder) -> None:
    train, evaluation = split(folder, [TEXT_ONLY], eval_fraction=0.0)
    assert (train, evaluation) == ({"fine"}, set())


def test_too_few_samples_to_split_are_refused(folder: DataFolder) -> None:
    with pytest.raises(UserError, match="too few to split off 10%"):
        split(folder, [TEXT_ONLY])


def test_the_fingerprint_covers_the_content_but_not_addresses_and_order(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = DataFolder(tmp_path / "here"), DataFolder(tmp_path / "there")
    samples = many(here, 6)
    many(there, 6)
    first = here.check(samples).fingerprint
    assert there.check(samples[::-1]).fingerprint == first
    (there.path / "0.png").write_bytes(png(99))
    assert there.check(samples).fingerprint != first
    assert here.check(samples[:-1]).fingerprint != first
    assert (
        here.check([*samples[:-1], {**samples[-1], TURNS: [ASK, {**ANSWER, "content": "Else."}]}]).fingerprint != first
    )


def test_equal_input_gives_equal_bytes(folder: DataFolder) -> None:
    samples = [*many(folder, 60), {TURNS: []}]

    def written() -> dict[str, bytes]:
        folder.check(samples)
        paths = [*folder.dataset.iterdir(), folder.rejects_file]
        return {path.name: path.read_bytes() for path in paths if path.name != MARK}  # which contains times

    assert written() == written()


def test_data_and_images_may_be_in_object_storage(s3_uri: str, folder: DataFolder) -> None:
    conversation = {TURNS: [ASK, ANSWER]}
    storage.write_bytes(f"{s3_uri}/set/pictures/a.png", png(1))
    storage.write_bytes(f"{s3_uri}/other/b.png", png(2))
    samples = [
        {"image": "pictures/a.png", **conversation},
        {"image": "../other/b.png", **conversation},
        {"image": f"{s3_uri}/other/b.png", **conversation},
        {"image": str(folder.path / "a.png"), **conversation},
        {"image": "no.png", **conversation},
    ]
    storage.write_bytes(f"{s3_uri}/set/train.json", json.dumps(samples).encode())
    uri = f"{s3_uri}/set/train.json"
    settings = ValidationSettings(max_reject_ratio=0.5)
    validate_data(uri, uri, folder.dataset, folder.rejects_file, settings)
    assert [sample.images[0].uri for sample in folder.samples] == [
        f"{s3_uri}/set/pictures/a.png",
        f"{s3_uri}/other/b.png",
        f"{s3_uri}/other/b.png",
        str(folder.path / "a.png"),
    ]
    assert [reject.reason for reject in folder.rejects] == ["image_missing"] * 2


def test_an_unavailable_store_does_not_reject_samples(
    s3_uri: str, unreachable: str, folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", unreachable)
    with pytest.raises(RetryableError, match="does not answer"):
        folder.check([TEXT_ONLY, {"image": f"{s3_uri}/a.png", TURNS: [ASK, ANSWER]}])


def test_an_image_without_permission_is_rejected(
    s3_uri: str, folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3_uri}/a.png", png(1))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped-secret")
    reject = folder.rejected({"image": f"{s3_uri}/a.png", TURNS: [ASK, ANSWER]})
    assert "access denied" in reject.message


def test_many_images_of_a_store_are_checked_in_the_pool(
    s3_uri: str, unreachable: str, folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(folder.path / "0.tar", {f"{number}.png": png(number) for number in range(30)})
    storage.write_bytes(f"{s3_uri}/set/0.tar", (folder.path / "0.tar").read_bytes())
    for number in range(30, 60):
        storage.write_bytes(f"{s3_uri}/set/{number}.png", png(number))
    names = [f"0.tar!{number}.png" if number < 30 else f"{number}.png" for number in range(60)]
    samples = [{"image": f"{s3_uri}/set/{name}", TURNS: [ASK, ANSWER]} for name in names]
    folder.check(samples)
    assert folder.rejects == []
    assert [read_image(sample.images[0]) for sample in folder.samples] == [png(number) for number in range(60)]
    monkeypatch.setenv("AWS_ENDPOINT_URL", unreachable)
    with pytest.raises(RetryableError, match="does not answer"):
        folder.check(samples[30:] * 2)
