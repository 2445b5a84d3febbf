"""The answer to one question."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from minicpmv_finetune.components.evaluate.evaluate import EvaluationSettings, evaluate
from minicpmv_finetune.components.evaluate.predict import predict
from minicpmv_finetune.data.samples import read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.checkpoint import load_model


def test_predict_gives_the_same_answer_as_evaluate(tiny_46: Path, dataset: Path, tmp_path: Path) -> None:
    sample = next(iter(read_samples(dataset, "eval")))
    evaluate(tiny_46, "", dataset, tmp_path / "predictions", tmp_path / "report", EvaluationSettings(max_new_tokens=12))
    expected = json.loads((tmp_path / "predictions").read_text().splitlines()[0])["tuned"]
    assert predict(str(tiny_46), [sample.images[0].uri], sample.turns[0].text, max_new_tokens=12) == expected


def test_an_adapter_changes_the_answer(tiny_46: Path, digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(load_model(tiny_46)[0], LoraConfig(target_modules=["q_proj", "in_proj_qkv", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    images = [str(path) for path in sorted((digits / "images").glob("*.png"))[:2]]
    plain = predict(str(tiny_46), images, "Which are these?", max_new_tokens=12)
    tuned = predict(str(tiny_46), images, "Which are these?", str(tmp_path / "adapter"), max_new_tokens=12)
    assert plain
    assert plain != tuned


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " "}, "prompt: the prompt is empty"),
        ({"prompt": "an <|im_end|> inside"}, "prompt: .*special token"),
        ({"max_new_tokens": 0}, "no room"),
        ({"thinking": True}, "thinking: MiniCPM-V 4.6 has no think blocks"),
        ({"images": ["missing.png"]}, "missing.png: not found"),
        ({"images": [__file__]}, "not a readable image"),
        ({"adapter_uri": str(Path(__file__).parent)}, "no adapter_config.json"),
        ({"model_uri": str(Path(__file__).parent)}, "no config.json"),
    ],
)
def test_invalid_inputs_are_named(tiny_46: Path, change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"model_uri": str(tiny_46), "images": [], "prompt": "Which?", **change}
    with pytest.raises(UserError, match=words):
        predict(**arguments)
