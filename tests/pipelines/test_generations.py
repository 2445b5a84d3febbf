"""The five steps in sequence, on a tiny checkpoint of every generation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minicpmv_finetune.components.evaluate.evaluate import EvaluationSettings, evaluate
from minicpmv_finetune.components.merge.merge import MergeSettings, merge
from minicpmv_finetune.components.preprocess.preprocess import PreprocessSettings, preprocess
from minicpmv_finetune.components.train.arguments import parse
from minicpmv_finetune.components.train.finetune import finetune
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.minicpmv.generations import GENERATIONS

TEXT_ONLY = {
    "id": "text",
    "conversations": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The digit is 3."}],
}


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
    validate_data(
        str(tmp_path / "train.json"),
        str(tmp_path / "eval.json"),
        tmp_path / "dataset",
        tmp_path / "rejects.jsonl",
        ValidationSettings(),
    )
    manifest = preprocess(
        tmp_path / "dataset", str(base), tmp_path / "shards", tmp_path / "too-long.jsonl", PreprocessSettings()
    )
    assert manifest.generation == version
    flags = {
        "model_name_or_path": base,
        "data_path": tmp_path / "shards",
        "output_dir": tmp_path / "adapter",
        "use_lora": "true",
        "tune_llm": "false",
        "lora_r": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": "true",
        "save_strategy": "no",
        "use_cpu": "true",
    }
    finetune(parse([word for name, value in flags.items() for word in (f"--{name}", str(value))]), [])
    report = merge(
        str(base),
        tmp_path / "adapter",
        tmp_path / "shards",
        tmp_path / "model",
        tmp_path / "merge.json",
        MergeSettings(parity_rows=1),
    )
    assert report.parity_check is not None
    assert report.parity_check.failure is None
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "model"))
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    assert {path.name for path in base.iterdir()} <= {path.name for path in (tmp_path / "model").iterdir()}
    result = evaluate(
        tmp_path / "model",
        str(base),
        tmp_path / "dataset",
        tmp_path / "predictions.jsonl",
        tmp_path / "report.html",
        EvaluationSettings(max_new_tokens=4),
    )
    assert result.metrics["samples"] == SIZES["eval"]


SIZES = {"train": 3, "eval": 2}
