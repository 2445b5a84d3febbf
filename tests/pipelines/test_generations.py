"""The five steps in sequence, on a tiny checkpoint of every generation, and on other kinds of data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from minicpmv_finetune.components.evaluate.assessment import Evaluation
from minicpmv_finetune.components.evaluate.evaluate import EvaluationSettings, evaluate
from minicpmv_finetune.components.merge.merge import MergeReport, MergeSettings, merge
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.finetune import finetune
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.minicpmv.generations import GENERATIONS
from minicpmv_finetune.shards.format import Manifest
from tests.warm_processes import warm_processes

TEXT_ONLY = {
    "id": "text",
    "conversations": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The digit is 3."}],
}


class Results(NamedTuple):
    """What the steps returned."""

    manifest: Manifest
    report: MergeReport
    evaluation: Evaluation


def _run_steps(base: Path, data: tuple[Path, Path], folder: Path, **changes: object) -> Results:
    """Run the steps in this process, as the pipeline does, on data to train on and to evaluate."""
    train, evaluation = map(str, data)
    validate_data(train, evaluation, folder / "dataset", folder / "rejects.jsonl", ValidationSettings())
    manifest = preprocess(
        folder / "dataset", str(base), folder / "shards", folder / "too-long.jsonl", PreprocessSettings()
    )
    flags = {
        "model_name_or_path": base,
        "data_path": folder / "shards",
        "output_dir": folder / "adapter",
        "use_lora": "true",
        "tune_llm": "false",
        "lora_r": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": "true",
        "save_strategy": "no",
        "use_cpu": "true",
        **changes,
    }
    finetune(parse([word for name, value in flags.items() for word in (f"--{name}", str(value))]), [])
    with warm_processes():
        report = merge(
            str(base),
            folder / "adapter",
            folder / "shards",
            folder / "model",
            folder / "merge.json",
            MergeSettings(parity_rows=1),
        )
    result = evaluate(
        folder / "model",
        str(base),
        folder / "dataset",
        folder / "predictions.jsonl",
        folder / "report.html",
        EvaluationSettings(max_new_tokens=4),
    )
    return Results(manifest, report, result)


@pytest.mark.parametrize("version", [generation.version for generation in GENERATIONS])
def test_all_steps_work_with_every_generation(
    version: str, tiny: Callable[[str], Path], digits: Path, tmp_path: Path
) -> None:
    base = tiny(version)
    data = {split: json.loads((digits / f"{split}.json").read_text())[:count] for split, count in SIZES.items()}
    data["train"].append(TEXT_ONLY)
    for split, rows in data.items():
        located = [row | ({"image": str(digits / row["image"])} if "image" in row else {}) for row in rows]
        (tmp_path / f"{split}.json").write_text(json.dumps(located))
    found = _run_steps(base, (tmp_path / "train.json", tmp_path / "eval.json"), tmp_path)
    assert found.manifest.generation == version
    assert found.report.parity_check is not None
    assert found.report.parity_check.failure is None
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "model"))
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    assert {path.name for path in base.iterdir()} <= {path.name for path in (tmp_path / "model").iterdir()}
    assert found.evaluation.metrics["samples"] == SIZES["eval"]


def test_photographs_several_images_several_turns_and_text_only_samples_work(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg")
    samples = [
        {
            "id": "both",
            "image": {"<image_00>": "china.jpg", "<image_01>": "flower.jpg"},
            "conversations": [
                {"role": "user", "content": "<image_01> and <image_00>: what do they show?"},
                {"role": "assistant", "content": "A flower and a temple."},
                {"role": "user", "content": "Which was first?"},
                {"role": "assistant", "content": "The flower."},
            ],
        },
        {
            "id": "one",
            "image": "china.jpg",
            "conversations": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "Where is this?"},
                {"role": "assistant", "content": "In China."},
            ],
        },
        {
            "id": "none",
            "conversations": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}],
        },
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    data = tmp_path / "data.jsonl"
    found = _run_steps(tiny("2.6"), (data, data), tmp_path, max_steps=2, learning_rate=1e-3)
    assert found.manifest.rows("train") == 3
    assert found.evaluation.metrics["samples"] == 3


SIZES = {"train": 3, "eval": 2}
