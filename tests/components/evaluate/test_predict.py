"""The answer to one question."""

import base64
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from minicpmv_finetune.components.evaluate.evaluate import EvaluationSettings, evaluate
from minicpmv_finetune.components.evaluate.predict import predict
from minicpmv_finetune.data.samples import read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.serving.asking import question_sample


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


def write_image(path: Path, color: str = "red") -> str:
    Image.new("RGB", (9, 7), color).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("prompt", "count", "parts"),
    [
        ("Which?", 0, ("Which?",)),
        ("Which?", 1, (0, "\nWhich?")),
        ("Is <image> red?", 1, ("Is ", 0, " red?")),
        ("Is <image_00> red?", 1, ("Is ", 0, " red?")),
        ("Which?", 2, (0, "\n", 1, "\nWhich?")),
        ("<image_01> or <image_00>?", 2, (1, " or ", 0, "?")),
    ],
)
def test_images_are_where_the_prompt_marks_them(
    prompt: str, count: int, parts: tuple[str | int, ...], tmp_path: Path
) -> None:
    images = [write_image(tmp_path / f"{number}.png", color) for number, color in enumerate(["red", "blue"][:count])]
    sample = question_sample(images, prompt)
    assert sample.turns[0].parts == parts
    assert [image.uri for image in sample.images] == images


def test_images_are_addressed_as_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write_image(tmp_path / "a.png"))
    monkeypatch.chdir(tmp_path)
    with tarfile.open("a.tar", "w") as archive:
        archive.add("a.png")
    uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    samples = [question_sample([address], "Which?") for address in ("a.png", str(path), "a.tar!a.png", uri)]
    assert len({sample.images[0].sha256 for sample in samples}) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("page.eps", "PostScript"),
        ("a.pcx", "of no known format"),
        ("moving.gif", "several frames"),
        ("deep.png", "8 bits"),
    ],
)
def test_an_image_that_validation_refuses_is_refused(name: str, words: str, tmp_path: Path) -> None:
    kind = {"page.eps": "EPS", "a.pcx": "PCX"}.get(name)
    image = Image.new("I;16" if name == "deep.png" else "RGB", (9, 7))
    frames = {"save_all": True, "append_images": [Image.new("RGB", (9, 7), "red")]} if name == "moving.gif" else {}
    image.save(tmp_path / name, kind, **frames)
    renamed = (tmp_path / name).rename(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match=rf"photo\.jpg: .*{words}"):
        question_sample([str(renamed)], "Which?")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " "}, "has no text"),
        ({"prompt": "an <|im_end|> inside"}, "prompt: .*special token"),
        ({"max_new_tokens": 0}, "no room"),
        ({"thinking": True}, "thinking: MiniCPM-V 4.6 has no think blocks"),
        ({"images": ["missing.png"]}, "missing.png: not found"),
        ({"images": [__file__]}, "not a readable image"),
        ({"images": [" "]}, "image: an address is empty"),
        ({"images": ["https://example.org/a.png"]}, "web addresses are refused"),
        ({"images": ["data:image/png;base64,AAAA"]}, "not a readable image"),
        ({"prompt": "<image> Which?"}, "prompt: the text contains <image>, but"),
        ({"prompt": "<image> <image_00>"}, "prompt: the text contains"),
        ({"adapter_uri": str(Path(__file__).parent)}, "no adapter_config.json"),
        ({"model_uri": str(Path(__file__).parent)}, "no config.json"),
    ],
)
def test_invalid_inputs_are_named(tiny_46: Path, change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"model_uri": str(tiny_46), "images": [], "prompt": "Which?", **change}
    with pytest.raises(UserError, match=words):
        predict(**arguments)
