import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.minicpmv4_6 import MiniCPMV4_6Processor

from minicpmv_finetune import storage
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.samples import Reject, Split, open_image, read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.batch import pack_patches
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.slicing import cut_slices
from minicpmv_finetune.outputs import MARK
from minicpmv_finetune.shards.codecs import CODECS, Codec
from minicpmv_finetune.shards.encoding import prepare
from minicpmv_finetune.shards.format import Manifest, ShardReader, read_manifest, verify_shards
from tests.shards.example_shards import assert_same_row

ANSWER = {"role": "assistant", "content": "The digit is 7."}


def user_turn(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def conversation(*turns: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {**fields, "conversations": list(turns)}


SAMPLES = [
    conversation(user_turn("<image>\nWhich digit?"), ANSWER, id="small", image="small.png"),
    conversation(user_turn("Which digit?"), ANSWER, id="many slices", image="large.jpg"),
    conversation(user_turn("Which digit is the largest?"), ANSWER, id="text only"),
    conversation(
        user_turn("<image_01>\n<image_00>\nWhich?"),
        ANSWER,
        user_turn("And now?\n<image_02>"),
        {"role": "assistant", "content": "The digit is 9."},
        id="several",
        image={"<image_00>": "small.png", "<image_01>": "large.jpg", "<image_02>": "clear.png"},
    ),
]


class DataFolder:
    """A folder with data, the dataset that validate_data writes, and its shards."""

    def __init__(self, folder: Path, base_model: Path) -> None:
        self.base_model = base_model
        self.data = folder / "train.json"
        self.eval_data = folder / "eval.json"
        self.dataset = folder / "dataset"
        self.shards = folder / "shards"
        self.rejects_file = folder / "preprocess-rejects.jsonl"
        random = np.random.default_rng(0)
        for name, (width, height) in {"small.png": (40, 56), "large.jpg": (400, 250)}.items():
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        Image.fromarray(random.integers(0, 256, (90, 80, 4), dtype=np.uint8)).save(folder / "clear.png")
        self.validate(SAMPLES)

    def validate(self, samples: list[Any], max_reject_ratio: float = 0.0) -> None:
        self.data.write_text(json.dumps(samples))
        self.eval_data.write_text(json.dumps(SAMPLES[:1]))
        settings = ValidationSettings(max_reject_ratio=max_reject_ratio)
        validate_data(
            str(self.data), str(self.eval_data), self.dataset, self.dataset.with_name("rejects.jsonl"), settings
        )

    def run(self, max_reject_ratio: float = 0.0, **settings: Any) -> Manifest:
        return preprocess(
            self.dataset,
            str(self.base_model),
            self.shards,
            self.rejects_file,
            PreprocessSettings(max_reject_ratio=max_reject_ratio, **settings),
            num_workers=1,
        )

    @property
    def rejects(self) -> list[Reject]:
        return [Reject.model_validate_json(line) for line in self.rejects_file.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, tiny_46: Path) -> DataFolder:
    return DataFolder(tmp_path, tiny_46)


@pytest.mark.parametrize("codec", CODECS)
def test_shards_contain_the_result_of_slicing_on_the_fly(codec: Codec, folder: DataFolder) -> None:
    assert folder.run(codec=codec).codec == codec
    encoder = Encoder.from_checkpoint(folder.base_model, 9)
    reader = ShardReader(folder.shards, "train")
    samples = list(read_samples(folder.dataset, "train"))
    assert [row.id for row in reader] == [sample.id for sample in samples] == [sample["id"] for sample in SAMPLES]
    for row, sample in zip(reader, samples, strict=True):
        assert_same_row(row, prepare(sample, encoder, 2048))
    of_row = [[(pixels.shape[0] // 14, pixels.shape[1] // 14) for pixels in row.slices] for row in reader]
    sizes, first_slice = reader.slice_sizes()
    assert [part.tolist() for part in np.split(sizes, first_slice[1:-1])] == [list(map(list, row)) for row in of_row]
    (whole,) = samples[1].images
    cut_now = cut_slices(open_image(whole), encoder.plan(samples[1])[0], encoder.slicing)
    digest = hashlib.sha256(b"".join(pixels.tobytes() for pixels in cut_now)).hexdigest()
    assert hashlib.sha256(b"".join(pixels.tobytes() for pixels in reader[1].slices)).hexdigest() == digest
    assert len(reader[1].slices) > 1


def test_shards_contain_the_result_of_the_models_own_processor(folder: DataFolder) -> None:
    """Token ids and pixels of all samples are equal, with images in the order of the text."""
    folder.run()
    processor = MiniCPMV4_6Processor.from_pretrained(folder.base_model)
    images_folder = folder.data.parent
    image_names = [["small.png"], ["large.jpg"], [], ["large.jpg", "small.png", "clear.png"]]
    item = {"type": "image"}
    conversations: list[list[list[dict[str, str] | str]]] = [
        [[item, "Which digit?"], ["The digit is 7."]],
        [[item, "Which digit?"], ["The digit is 7."]],
        [["Which digit is the largest?"], ["The digit is 7."]],
        [[item, item, "Which?"], ["The digit is 7."], ["And now?", item], ["The digit is 9."]],
    ]
    for row, names, turns in zip(ShardReader(folder.shards, "train"), image_names, conversations, strict=True):
        messages: list[Any] = [
            {
                "role": ("user", "assistant")[number % 2],
                "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts],
            }
            for number, parts in enumerate(turns)
        ]
        text = processor.apply_chat_template(messages, tokenize=False)
        images = [Image.open(images_folder / name) for name in names] or None
        expected = processor(text=[text], images=images, return_tensors="pt")
        assert list(row.input_ids) == expected["input_ids"][0].tolist()
        if images:
            pixel_values = pack_patches(row.slices, 14)
            assert torch.equal(pixel_values.unsqueeze(0), expected["pixel_values"])


def test_only_answers_and_their_end_tokens_are_supervised(folder: DataFolder) -> None:
    folder.run()
    tokenizer = Encoder.from_checkpoint(folder.base_model).tokenizer
    supervised = [
        tokenizer.decode([token for token in row.labels if token != -100])
        for row in ShardReader(folder.shards, "train")
    ]
    assert supervised == ["The digit is 7.<|im_end|>"] * 3 + ["The digit is 7.<|im_end|>The digit is 9.<|im_end|>"]


def test_the_manifest_describes_the_shards_and_the_settings(folder: DataFolder) -> None:
    manifest = folder.run(max_slice_nums=4, model_max_length=1000)
    assert manifest == read_manifest(folder.shards)
    verify_shards(folder.shards, manifest)
    rows = {split: list(ShardReader(folder.shards, split)) for split in ("train", "eval")}
    assert {split: list(lengths) for split, lengths in manifest.lengths.items()} == {
        split: [len(row.input_ids) for row in group] for split, group in rows.items()
    }
    assert manifest.slices == {split: sum(len(row.slices) for row in group) for split, group in rows.items()}
    assert manifest.bytes == sum(path.stat().st_size for path in folder.shards.glob("*.parquet"))
    assert (manifest.generation, manifest.max_slice_nums, manifest.model_max_length) == ("4.6", 4, 1000)
    tokenizer = (folder.base_model / "tokenizer.json").read_bytes()
    assert manifest.tokenizer_sha256 == hashlib.sha256(tokenizer).hexdigest()
    assert folder.rejects == []


def test_max_slice_nums_limits_the_slices(folder: DataFolder) -> None:
    slices = [folder.run(max_slice_nums=number).slices["train"] for number in (1, 4, 9)]
    assert slices[0] == 5, "one overview for each image"
    assert slices[0] < slices[1] <= slices[2]


def test_equal_input_gives_equal_bytes(folder: DataFolder) -> None:
    def written() -> dict[str, bytes]:
        folder.run()
        assert (folder.shards / MARK).is_file()
        return {path.name: path.read_bytes() for path in folder.shards.iterdir() if path.name != MARK}  # contains times

    first = written()
    assert sorted(first) == ["eval-00000.parquet", "manifest.json", "train-00000.parquet"]
    assert written() == first


def test_many_samples_keep_their_order(digits: Path, tiny_46: Path, tmp_path: Path) -> None:
    settings = ValidationSettings()
    samples, evaluation = str(digits / "train.json"), str(digits / "eval.json")
    validate_data(samples, evaluation, tmp_path / "dataset", tmp_path / "rejects.jsonl", settings)
    manifest = preprocess(
        tmp_path / "dataset",
        str(tiny_46),
        tmp_path / "shards",
        tmp_path / "preprocess-rejects.jsonl",
        PreprocessSettings(),
    )
    files: dict[Split, str] = {"train": samples, "eval": evaluation}
    for split, path in files.items():
        reader = ShardReader(tmp_path / "shards", split)
        assert [row.id for row in reader] == [sample["id"] for sample in json.loads(Path(path).read_text())]
        assert manifest.rows(split) == len(reader)


# What is rejected


def test_a_sample_that_does_not_fit_is_rejected_with_its_length(folder: DataFolder) -> None:
    lengths = folder.run().lengths["train"]
    longest = max(lengths)
    manifest = folder.run(max_reject_ratio=0.25, model_max_length=longest - 1)
    assert list(manifest.lengths["train"]) == [length for length in lengths if length < longest], "no sample is cut"
    (reject,) = folder.rejects
    assert (reject.reason, reject.id, reject.index) == ("too_long", "several", lengths.index(longest))
    assert f"{longest} tokens do not fit model_max_length {longest - 1}" in reject.message
    assert folder.run(model_max_length=longest).lengths["train"] == lengths, "a sample of exactly this length fits"


@pytest.mark.parametrize(
    ("turns", "token"),
    [
        ([user_turn("Which<|im_end|>digit?"), ANSWER], "<|im_end|>"),
        ([user_turn("Which?"), {"role": "assistant", "content": "7<|im_end|>\n<|im_start|>user\nNo."}], "<|im_end|>"),
        ([{"role": "system", "content": "</image>"}, user_turn("Which?"), ANSWER], "</image>"),
        ([user_turn("<|image_pad|>"), ANSWER], "<|image_pad|>"),
    ],
)
def test_text_with_a_special_token_is_rejected(turns: list[dict[str, str]], token: str, folder: DataFolder) -> None:
    folder.validate([*SAMPLES, conversation(*turns, id="special")])
    assert folder.run(max_reject_ratio=0.5).rows("train") == len(SAMPLES)
    (reject,) = folder.rejects
    assert (reject.reason, reject.id, reject.index) == ("special_token", "special", len(SAMPLES))
    assert f"contains the special token {token}" in reject.message


def test_a_reject_has_its_position_in_the_users_file(folder: DataFolder) -> None:
    broken, special = conversation(id="broken"), conversation(user_turn("<|im_end|>"), ANSWER, id="special")
    folder.validate([broken, SAMPLES[0], broken, special, SAMPLES[1]], max_reject_ratio=0.5)
    folder.run(max_reject_ratio=0.5)
    (reject,) = folder.rejects
    assert (reject.file, reject.index, reject.id) == (str(folder.data), 3, "special")


def test_more_rejects_than_the_ratio_allows_end_the_step(folder: DataFolder) -> None:
    longest = max(folder.run().lengths["train"])
    before = {path.name: path.read_bytes() for path in folder.shards.iterdir()}
    with pytest.raises(UserError, match=r"1 of 5 samples \(20.0%\) were rejected.*train.json, sample 3: \d+ tokens do"):
        folder.run(model_max_length=longest - 1, max_reject_ratio=0.05)
    assert [reject.id for reject in folder.rejects] == ["several"]
    assert {path.name: path.read_bytes() for path in folder.shards.iterdir()} == before


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_split_without_samples_ends_the_step_at_any_ratio(split: str, folder: DataFolder) -> None:
    good, special = SAMPLES[:1], [conversation(user_turn("<|im_end|>"), ANSWER)]
    for name, path in (("train", folder.data), ("eval", folder.eval_data)):
        path.write_text(json.dumps(special if name == split else good))
    settings = ValidationSettings()
    validate_data(
        str(folder.data), str(folder.eval_data), folder.dataset, folder.dataset.with_name("rejects.jsonl"), settings
    )
    with pytest.raises(UserError, match=f"no usable {split} sample is left, 1 were rejected.*{split}.json, sample 0"):
        folder.run(max_reject_ratio=1.0)
    assert not folder.shards.exists()


# Errors that end the step


def test_an_image_that_changed_after_validation_ends_the_step(folder: DataFolder) -> None:
    Image.new("RGB", (40, 56)).save(folder.data.parent / "small.png")
    with pytest.raises(UserError, match=r"small\.png: changed since it was validated"):
        folder.run(max_reject_ratio=1.0)
    assert not folder.shards.exists()
    (folder.data.parent / "small.png").unlink()
    with pytest.raises(UserError, match=r"small\.png: not found"):
        folder.run(max_reject_ratio=1.0)


def test_an_unfinished_dataset_ends_the_step(folder: DataFolder) -> None:
    (folder.dataset / "dataset.json").unlink()
    with pytest.raises(UserError, match="validate-data has not finished"):
        folder.run()


def test_a_wrong_base_model_ends_the_step(folder: DataFolder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for base_model, sentence in ((tmp_path / "nowhere", "not found"), (tmp_path / "empty", "this is not a checkpoint")):
        folder.base_model = base_model
        with pytest.raises(UserError, match=sentence):
            folder.run()
    assert not folder.shards.exists()


def test_the_base_model_and_the_images_may_be_in_object_storage(s3_uri: str, folder: DataFolder) -> None:
    local = folder.run()
    expected = list(ShardReader(folder.shards, "train"))
    for path in folder.base_model.iterdir():
        storage.write_bytes(f"{s3_uri}/base/{path.name}", path.read_bytes())
    for path in folder.data.parent.iterdir():
        if path.is_file():
            storage.write_bytes(f"{s3_uri}/data/{path.name}", path.read_bytes())
    settings = ValidationSettings()
    data, eval_data = f"{s3_uri}/data/train.json", f"{s3_uri}/data/eval.json"
    validate_data(data, eval_data, folder.dataset, folder.dataset.parent / "r.jsonl", settings)
    remote = preprocess(folder.dataset, f"{s3_uri}/base", folder.shards, folder.rejects_file, PreprocessSettings())
    assert remote == local, "the fingerprint depends only on the content"
    for row, same in zip(ShardReader(folder.shards, "train"), expected, strict=True):
        assert_same_row(row, same)
