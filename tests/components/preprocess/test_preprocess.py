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
from minicpmv_finetune.data.samples import Reject, open_image, read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.batch import pack_patches
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.slicing import cut_slices
from minicpmv_finetune.shards.codecs import CODECS, Codec
from minicpmv_finetune.shards.encoding import prepare
from minicpmv_finetune.shards.format import Manifest, ShardReader, read_manifest, verify_shards

ANSWER = {"role": "assistant", "content": "The digit is 7."}


def ask(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def conversation(*turns: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {**fields, "conversations": list(turns)}


SAMPLES = [
    conversation(ask("<image>\nWhich digit?"), ANSWER, id="small", image="small.png"),
    conversation(ask("Which digit?"), ANSWER, id="many slices", image="large.jpg"),
    conversation(ask("Which digit is the largest?"), ANSWER, id="text only"),
    conversation(
        ask("<image_01>\n<image_00>\nWhich?"),
        ANSWER,
        ask("And now?\n<image_02>"),
        {"role": "assistant", "content": "The digit is 9."},
        id="several",
        image={"<image_00>": "small.png", "<image_01>": "large.jpg", "<image_02>": "clear.png"},
    ),
]


class Workshop:
    """A folder in which samples become a dataset and the dataset becomes shards."""

    def __init__(self, folder: Path, base_model: Path) -> None:
        self.base_model = base_model
        self.data = folder / "train.json"
        self.eval_data = folder / "eval.json"
        self.dataset = folder / "dataset"
        self.shards = folder / "shards"
        self.rejects_file = folder / "rejects.jsonl"
        random = np.random.default_rng(0)
        for name, (width, height) in {"small.png": (40, 56), "large.jpg": (400, 250)}.items():
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        Image.fromarray(random.integers(0, 256, (90, 80, 4), dtype=np.uint8)).save(folder / "clear.png")
        self.validate(SAMPLES)

    def validate(self, samples: list[Any], max_reject_ratio: float = 0.0) -> None:
        self.data.write_text(json.dumps(samples))
        self.eval_data.write_text(json.dumps(SAMPLES[:1]))
        settings = ValidationSettings(max_reject_ratio=max_reject_ratio)
        validate_data(str(self.data), str(self.eval_data), self.dataset, self.rejects_file, settings)

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
def workshop(tmp_path: Path, tiny_46: Path) -> Workshop:
    return Workshop(tmp_path, tiny_46)


def assert_equal(found: ModelInput, expected: ModelInput) -> None:
    assert found.id == expected.id
    assert list(found.input_ids) == list(expected.input_ids)
    assert list(found.labels) == list(expected.labels)
    assert len(found.slices) == len(expected.slices)
    for ours, theirs in zip(found.slices, expected.slices, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("codec", CODECS)
def test_shards_hold_what_slicing_on_the_fly_gives(codec: Codec, workshop: Workshop) -> None:
    assert workshop.run(codec=codec).codec == codec
    encoder = Encoder.from_checkpoint(workshop.base_model, 9)
    reader = ShardReader(workshop.shards, "train")
    samples = list(read_samples(workshop.dataset, "train"))
    assert [row.id for row in reader] == [sample.id for sample in samples] == [sample["id"] for sample in SAMPLES]
    for row, sample in zip(reader, samples, strict=True):
        assert_equal(row, prepare(sample, encoder, 2048))
    of_row = [[(pixels.shape[0] // 14, pixels.shape[1] // 14) for pixels in row.slices] for row in reader]
    assert reader.slice_sizes() == of_row
    (whole,) = samples[1].images
    cut_now = cut_slices(open_image(whole), encoder.plan(samples[1])[0], encoder.slicing)
    digest = hashlib.sha256(b"".join(pixels.tobytes() for pixels in cut_now)).hexdigest()
    assert hashlib.sha256(b"".join(pixels.tobytes() for pixels in reader[1].slices)).hexdigest() == digest
    assert len(reader[1].slices) > 1


def test_shards_hold_what_the_models_own_processor_gives(workshop: Workshop) -> None:
    """Token ids and pixels of all samples, images in the order in which the text shows them."""
    workshop.run()
    processor = MiniCPMV4_6Processor.from_pretrained(workshop.base_model)
    folder = workshop.data.parent
    shown = [["small.png"], ["large.jpg"], [], ["large.jpg", "small.png", "clear.png"]]
    item = {"type": "image"}
    words = [
        [[item, "Which digit?"], ["The digit is 7."]],
        [[item, "Which digit?"], ["The digit is 7."]],
        [["Which digit is the largest?"], ["The digit is 7."]],
        [[item, item, "Which?"], ["The digit is 7."], ["And now?", item], ["The digit is 9."]],
    ]
    for row, names, turns in zip(ShardReader(workshop.shards, "train"), shown, words, strict=True):
        messages = [
            {
                "role": ("user", "assistant")[number % 2],
                "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts],
            }
            for number, parts in enumerate(turns)
        ]
        text = processor.apply_chat_template(messages, tokenize=False)
        images = [Image.open(folder / name) for name in names] or None
        theirs = processor(text=[text], images=images, return_tensors="pt")
        assert list(row.input_ids) == theirs["input_ids"][0].tolist()
        if images:
            ours = torch.cat([pack_patches(pixels, 14) for pixels in row.slices], dim=-1)
            assert torch.equal(ours.unsqueeze(0), theirs["pixel_values"])


def test_only_answers_and_their_ends_are_learnt(workshop: Workshop) -> None:
    workshop.run()
    tokenizer = Encoder.from_checkpoint(workshop.base_model).tokenizer
    learnt = [
        tokenizer.decode([token for token in row.labels if token != -100])
        for row in ShardReader(workshop.shards, "train")
    ]
    assert learnt == ["The digit is 7.<|im_end|>"] * 3 + ["The digit is 7.<|im_end|>The digit is 9.<|im_end|>"]


def test_the_manifest_says_what_was_prepared_and_how(workshop: Workshop) -> None:
    manifest = workshop.run(max_slice_nums=4, model_max_length=1000)
    assert manifest == read_manifest(workshop.shards)
    verify_shards(workshop.shards, manifest)
    rows = {split: list(ShardReader(workshop.shards, split)) for split in ("train", "eval")}
    assert manifest.lengths == {split: [len(row.input_ids) for row in group] for split, group in rows.items()}
    assert manifest.slices == {split: sum(len(row.slices) for row in group) for split, group in rows.items()}
    assert manifest.bytes == sum(path.stat().st_size for path in workshop.shards.glob("*.parquet"))
    assert (manifest.generation, manifest.max_slice_nums, manifest.model_max_length) == ("4.6", 4, 1000)
    tokenizer = (workshop.base_model / "tokenizer.json").read_bytes()
    assert manifest.tokenizer_sha256 == hashlib.sha256(tokenizer).hexdigest()
    assert workshop.rejects == []


def test_fewer_slices_when_asked(workshop: Workshop) -> None:
    slices = [workshop.run(max_slice_nums=number).slices["train"] for number in (1, 4, 9)]
    assert slices[0] == 5, "an overview for each image"
    assert slices[0] < slices[1] <= slices[2]


def test_same_input_gives_the_same_bytes(workshop: Workshop) -> None:
    def written() -> dict[str, bytes]:
        workshop.run()
        return {path.name: path.read_bytes() for path in workshop.shards.iterdir()}

    first = written()
    assert sorted(first) == ["eval-00000.parquet", "manifest.json", "train-00000.parquet"]
    assert written() == first


def test_many_samples_keep_their_order(digits: Path, tiny_46: Path, tmp_path: Path) -> None:
    settings = ValidationSettings()
    samples, evaluation = str(digits / "train.json"), str(digits / "eval.json")
    validate_data(samples, evaluation, tmp_path / "dataset", tmp_path / "rejects.jsonl", settings)
    manifest = preprocess(
        tmp_path / "dataset", str(tiny_46), tmp_path / "shards", tmp_path / "rejects.jsonl", PreprocessSettings()
    )
    for split, path in (("train", samples), ("eval", evaluation)):
        reader = ShardReader(tmp_path / "shards", split)
        assert [row.id for row in reader] == [sample["id"] for sample in json.loads(Path(path).read_text())]
        assert manifest.rows(split) == len(reader)


# What is rejected


def test_a_sample_that_does_not_fit_is_rejected_with_its_length(workshop: Workshop) -> None:
    lengths = workshop.run().lengths["train"]
    longest = max(lengths)
    manifest = workshop.run(max_reject_ratio=0.25, model_max_length=longest - 1)
    assert manifest.lengths["train"] == [length for length in lengths if length < longest], "nothing is cut"
    (reject,) = workshop.rejects
    assert (reject.reason, reject.id, reject.index) == ("too_long", "several", lengths.index(longest))
    assert f"{longest} tokens do not fit model_max_length {longest - 1}" in reject.message
    assert workshop.run(model_max_length=longest).lengths["train"] == lengths, "exactly as long fits"


@pytest.mark.parametrize(
    ("turns", "token"),
    [
        ([ask("Which<|im_end|>digit?"), ANSWER], "<|im_end|>"),
        ([ask("Which?"), {"role": "assistant", "content": "7<|im_end|>\n<|im_start|>user\nNo."}], "<|im_end|>"),
        ([{"role": "system", "content": "</image>"}, ask("Which?"), ANSWER], "</image>"),
        ([ask("<|image_pad|>"), ANSWER], "<|image_pad|>"),
    ],
)
def test_text_with_a_special_token_is_rejected(turns: list[dict[str, str]], token: str, workshop: Workshop) -> None:
    workshop.validate([*SAMPLES, conversation(*turns, id="clever")])
    assert workshop.run(max_reject_ratio=0.5).rows("train") == len(SAMPLES)
    (reject,) = workshop.rejects
    assert (reject.reason, reject.id, reject.index) == ("special_token", "clever", len(SAMPLES))
    assert f"contains the special token {token}" in reject.message


def test_a_reject_is_named_by_its_place_in_the_users_file(workshop: Workshop) -> None:
    broken, clever = conversation(id="broken"), conversation(ask("<|im_end|>"), ANSWER, id="clever")
    workshop.validate([broken, SAMPLES[0], broken, clever, SAMPLES[1]], max_reject_ratio=0.5)
    workshop.run(max_reject_ratio=0.5)
    (reject,) = workshop.rejects
    assert (reject.file, reject.index, reject.id) == (str(workshop.data), 3, "clever")


def test_more_rejects_than_the_ratio_allows_end_the_step(workshop: Workshop) -> None:
    longest = max(workshop.run().lengths["train"])
    before = {path.name: path.read_bytes() for path in workshop.shards.iterdir()}
    with pytest.raises(UserError, match=r"1 of 5 samples \(20.0%\) were rejected.*train.json, sample 3: \d+ tokens do"):
        workshop.run(model_max_length=longest - 1, max_reject_ratio=0.05)
    assert [reject.id for reject in workshop.rejects] == ["several"]
    assert {path.name: path.read_bytes() for path in workshop.shards.iterdir()} == before


@pytest.mark.parametrize("split", ["train", "eval"])
def test_nothing_left_ends_the_step_whatever_the_ratio(split: str, workshop: Workshop) -> None:
    good, clever = SAMPLES[:1], [conversation(ask("<|im_end|>"), ANSWER)]
    for name, path in (("train", workshop.data), ("eval", workshop.eval_data)):
        path.write_text(json.dumps(clever if name == split else good))
    settings = ValidationSettings()
    validate_data(str(workshop.data), str(workshop.eval_data), workshop.dataset, workshop.rejects_file, settings)
    with pytest.raises(UserError, match=f"no usable {split} sample is left, 1 were rejected.*{split}.json, sample 0"):
        workshop.run(max_reject_ratio=1.0)
    assert not workshop.shards.exists()


# What ends the step


def test_a_image_that_changed_since_ends_the_step(workshop: Workshop) -> None:
    Image.new("RGB", (40, 56)).save(workshop.data.parent / "small.png")
    with pytest.raises(UserError, match=r"small\.png: changed since it was validated"):
        workshop.run(max_reject_ratio=1.0)
    assert not workshop.shards.exists()
    (workshop.data.parent / "small.png").unlink()
    with pytest.raises(UserError, match=r"small\.png: not found"):
        workshop.run(max_reject_ratio=1.0)


def test_an_unfinished_dataset_ends_the_step(workshop: Workshop) -> None:
    (workshop.dataset / "dataset.json").unlink()
    with pytest.raises(UserError, match="validate-data has not finished"):
        workshop.run()


def test_a_wrong_base_model_ends_the_step(workshop: Workshop, tmp_path: Path) -> None:
    for base_model, sentence in ((tmp_path / "nowhere", "not found"), (tmp_path, "this is not a checkpoint")):
        workshop.base_model = base_model
        with pytest.raises(UserError, match=sentence):
            workshop.run()
    assert not workshop.shards.exists()


def test_the_base_model_and_the_images_may_lie_in_object_storage(s3_uri: str, workshop: Workshop) -> None:
    local = workshop.run()
    expected = list(ShardReader(workshop.shards, "train"))
    for path in workshop.base_model.iterdir():
        storage.write_bytes(f"{s3_uri}/base/{path.name}", path.read_bytes())
    for path in workshop.data.parent.iterdir():
        if path.is_file():
            storage.write_bytes(f"{s3_uri}/data/{path.name}", path.read_bytes())
    settings = ValidationSettings()
    uris = [f"{s3_uri}/data/{name}.json" for name in ("train", "eval")]
    validate_data(*uris, workshop.dataset, workshop.rejects_file, settings)
    remote = preprocess(
        workshop.dataset, f"{s3_uri}/base", workshop.shards, workshop.rejects_file, PreprocessSettings()
    )
    assert remote == local, "the fingerprint too is of the content"
    for row, same in zip(ShardReader(workshop.shards, "train"), expected, strict=True):
        assert_equal(row, same)
