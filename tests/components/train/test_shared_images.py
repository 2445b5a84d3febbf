"""Samples about one image come out of the shards as one row that has the image once."""

import json
from pathlib import Path
from typing import Any

import torch

from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.datasets import Collator, ExampleDataset, PackDataset
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.minicpmv.batch import collate_packed
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.pipelines.demo import write_digits
from minicpmv_finetune.shards.sharing import Beginnings, read_beginnings, share_images


def test_rows_of_samples_that_share_an_image(tiny_46: Path, tmp_path: Path) -> None:
    data, _ = write_digits(tmp_path / "digits", seed=0, held_out=16)
    digits = json.loads(data.read_text())[:2]
    samples = []
    for number, question in enumerate(("Which digit?", "Which digit is this?", "Digit?", "Which?")):
        sample = json.loads(json.dumps(digits[number == 3])) | {"id": str(number)}  # the last has another image
        sample["conversations"][0]["content"] = f"<image>\n{question}"
        samples.append(sample)
    data.write_text(json.dumps(samples))
    settings = ValidationSettings(eval_fraction=0)
    validate_data(str(data), "", tmp_path / "dataset", tmp_path / "rejects.jsonl", settings)
    preprocess(tmp_path / "dataset", str(tiny_46), tmp_path / "shards", tmp_path / "more.jsonl", PreprocessSettings())
    examples = ExampleDataset(tmp_path / "shards", "train", None)
    encoder = Encoder.from_checkpoint(tiny_46)
    image_token: Any = encoder.tokenizer.convert_tokens_to_ids(encoder.generation.image_token)
    images = share_images(Beginnings.of(read_beginnings(examples.reader, image_token)), examples.lengths, capacity=1000)
    assert sorted(map(len, images.groups)) == [1, 3]
    dataset = PackDataset(examples, images.groups, images.shared)
    assert dataset.lengths == images.lengths(examples.lengths)

    batch = Collator(examples.reader.manifest)([dataset[number] for number in range(len(dataset))])
    order = [number for group in images.groups for number in group]
    shared = [images.shared[number] for number in order]
    assert batch.pop("rows") == order
    assert batch.pop("shared_tokens") == sum(shared) > 0
    expected = collate_packed([examples.reader[number] for number in order], 14, normalized=False, shared=shared)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(expected[name])) for name in expected)
    assert len(batch["target_sizes"]) == 2
