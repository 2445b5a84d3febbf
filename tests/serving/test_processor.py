"""Requests become the tokens and pixels of the evaluation, in every generation."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.decoders import DecodeStream

from minicpmv_finetune import answer, load
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import GENERATIONS
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.serving.asking import question_sample
from minicpmv_finetune.serving.processor import ServedProcessor, conversation_sample, greedy_config

VERSIONS = [generation.version for generation in GENERATIONS]


def image_uri(size: tuple[int, int] = (900, 600)) -> str:
    noise = np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


IMAGE = image_uri()


def user(*items: str | dict[str, str]) -> dict[str, Any]:
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return {"role": "user", "content": content}


def shown(url: str = IMAGE) -> dict[str, str]:
    return {"type": "image", "url": url}


@pytest.fixture(scope="module")
def processor(tiny_46: Path) -> ServedProcessor:
    return ServedProcessor(Encoder.from_checkpoint(tiny_46))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_request_has_the_inputs_of_the_evaluation(tiny: Callable[[str], Path], version: str) -> None:
    encoder = Encoder.from_checkpoint(tiny(version))
    sample = question_sample([IMAGE], "Which digit is this?")
    prompt = ModelInput("", encoder.encode_prompt(sample), [], encoder.cut_images(sample))
    slicing = encoder.slicing
    expected = collate([prompt], encoder.pad_token_id, slicing.patch_size, "left", slicing.resampler)
    found = ServedProcessor(encoder).apply_chat_template(
        [user(shown(), "Which digit is this?")],
        tools=None,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        tokenize=True,
        load_audio_from_video=False,
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_a_served_answer_is_that_of_the_evaluation(tiny: Callable[[str], Path], version: str) -> None:
    model = load(tiny(version))
    served = ServedProcessor(model.encoder)
    image = image_uri((40, 30))
    inputs = served.apply_chat_template([user(shown(image), "Which digit is this?")])
    config = greedy_config(model, 8)
    with torch.inference_mode():
        tokens = model.model.generate(**inputs, generation_config=config)  # type: ignore[operator]
    text = served.decode(tokens[0, inputs["input_ids"].shape[1] :])
    assert text == answer(model, "Which digit is this?", image, max_new_tokens=8)


def test_parts_of_a_message_are_lines_and_earlier_turns_are_kept() -> None:
    other = image_uri((9, 7))
    sample = conversation_sample(
        [
            {"role": "system", "content": "Be brief."},
            user("Look:", shown(), shown(other), "Which?", "And why?"),
            {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
            user("Sure?"),
        ]
    )
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant", "user"]
    assert sample.turns[1].parts == ("Look:\n", 0, "\n", 1, "\nWhich?\nAnd why?")
    assert [(image.width, image.height) for image in sample.images] == [(900, 600), (9, 7)]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the last one must be the user's"),
        ([user("a"), {"role": "assistant", "content": "b"}], "the last one must be the user's"),
        ([{"role": "tool", "content": "a"}, user("b")], "the role 'tool' of message 0"),
        ([user({"type": "video", "url": "a"})], "message 0 has a video"),
        ([user(shown("https://example.org/a.png"), "Which?")], "send the image itself"),
        ([user(shown("/etc/hostname"), "Which?")], "send the image itself"),
        ([user(shown("data:image/png;base64,AAAA"), "Which?")], "image_url: .*not a readable image"),
        ([user("an <|im_end|> inside")], "prompt: .*special token"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(
    processor: ServedProcessor, messages: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        processor.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": [{}]}, "tools: not supported"),
        ({"num_frames": 32}, "num_frames: not supported"),
        ({"enable_thinking": True}, "MiniCPM-V 4.6 has no think blocks"),
    ],
)
def test_options_without_a_meaning_are_refused(processor: ServedProcessor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        processor.apply_chat_template([user("Which?")], **options)


@pytest.mark.parametrize("version", VERSIONS)
def test_words_between_brackets_stay_and_the_end_of_the_turn_does_not(
    tiny: Callable[[str], Path], version: str
) -> None:
    encoder = Encoder.from_checkpoint(tiny(version))
    served = ServedProcessor(encoder)
    end = encoder.tokenizer.convert_tokens_to_ids(encoder.generation.end_of_turn)
    ids = [*encoder.tokenizer("a <box>1 2</box>", add_special_tokens=False)["input_ids"], end]
    assert served.decode(torch.tensor([*ids, *ids])) == "a <box>1 2</box>"
    stream = DecodeStream([], skip_special_tokens=True)
    pieces = [stream.step(served.tokenizer._tokenizer, token) for token in ids]
    assert "".join(piece or "" for piece in pieces) == "a <box>1 2</box>"
