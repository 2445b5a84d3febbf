"""What is learnt and what stands for an image, written out: on tiny tokenizers of every generation."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicpmv_finetune.data.samples import ImageRef, Sample, SampleError, Turn
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import GENERATIONS
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL

VERSIONS = [generation.version for generation in GENERATIONS]
SMALL = ImageRef(uri="small.png", sha256="", width=100, height=60)
WIDE = ImageRef(uri="wide.png", sha256="", width=300, height=200)  # two rows of three slices


@pytest.fixture(params=VERSIONS)
def encoder(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Encoder:
    return Encoder.from_checkpoint(tiny(request.param))


def sample(*turns: str | tuple[str | int, ...], images: tuple[ImageRef, ...] = (), system: str = "") -> Sample:
    """The user begins."""
    said = [
        Turn(role="assistant" if number % 2 else "user", parts=(turn,) if isinstance(turn, str) else turn)
        for number, turn in enumerate(turns)
    ]
    opening = [Turn(role="system", parts=(system,))] if system else []
    return Sample(id="s", images=images, turns=(*opening, *said), source="data.json")


def learnt(encoder: Encoder, found: Sample) -> list[str]:
    """The runs of supervised tokens, as text."""
    encoded = encoder.encode(found)
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in {token, IGNORED_LABEL}
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED_LABEL:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [encoder.tokenizer.decode(run) for run in runs if run]


def shown(encoder: Encoder, found: Sample) -> str:
    """What the model reads of the first user's turn."""
    text = encoder.tokenizer.decode(encoder.encode(found).input_ids)
    return text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def image(encoder: Encoder, number: int, overview: int, grid: tuple[int, int] = (0, 0), each: int = 0) -> str:
    """An image's tokens as published: its number, the overview, and a line of slices for each row of the grid."""
    token = encoder.generation.image_token
    row = f"<slice>{token * each}</slice>" * grid[1]
    return f"<image_id>{number}</image_id><image>{token * overview}</image>" + "\n".join([row] * grid[0])


def test_every_answer_is_learnt_up_to_the_end_of_its_turn_and_nothing_else(encoder: Encoder) -> None:
    talk = sample(
        (0, "\nWhat is it?"), "A digit.", "Which\none?", "It is\n\n3 – or 8.", images=(WIDE,), system="Be brief."
    )
    assert learnt(encoder, talk) == ["A digit.<|im_end|>", "It is\n\n3 – or 8.<|im_end|>"]


def test_what_is_trained_ends_with_the_turn_whether_a_line_break_follows_or_not(encoder: Encoder) -> None:
    text = encoder.tokenizer.decode(encoder.encode(sample("Which?", "3")).input_ids).removeprefix("<s>")
    assert text.endswith("assistant\n" + encoder.generation.empty_thinking + "3<|im_end|>\n")
    whole, cut_off = encoder.encode_text(text), encoder.encode_text(text.removesuffix("\n"))
    assert cut_off.labels == whole.labels[: len(cut_off.labels)]
    assert set(whole.labels[len(cut_off.labels) :]) == {IGNORED_LABEL}


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|"), min_size=1, max_size=30)


@pytest.mark.parametrize("version", VERSIONS)
@given(questions=st.lists(WORDS, min_size=1, max_size=3), answers=st.lists(WORDS, min_size=3, max_size=3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_learnt_belongs_to_the_assistants_turns_alone(
    version: str, questions: list[str], answers: list[str], tiny: Callable[[str], Path]
) -> None:
    encoder = _encoder(tiny(version))
    turns = [turn for pair in zip(questions, answers, strict=False) for turn in pair]
    end = encoder.generation.end_of_turn
    runs = learnt(encoder, sample(*turns, images=()))
    assert len(runs) == len(questions)
    for run, answer in zip(runs, answers, strict=False):
        # A template may trim what it is given, and a tokenizer compose characters; no word of anybody else is learnt.
        answer = normalize("NFC", answer)
        assert run.endswith(end)
        assert normalize("NFC", run.removesuffix(end)).strip() in answer
        assert answer.strip() in normalize("NFC", run)


@cache
def _encoder(folder: Path) -> Encoder:
    return Encoder.from_checkpoint(folder)


def test_a_question_without_an_answer_teaches_nothing(encoder: Encoder) -> None:
    assert learnt(encoder, sample("What is it?")) == []


@pytest.mark.parametrize("answer", ["3", " 3", "3\n", "assistant\n", "数字"])
def test_an_answer_is_learnt_with_its_first_and_last_character(encoder: Encoder, answer: str) -> None:
    ids = encoder.encode(sample("Which?", answer))
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert learnt(encoder, sample("Which?", answer)) == [f"{answer}<|im_end|>"]
    assert [label for label in ids.labels if label != IGNORED_LABEL][-1] == end
    assert ids.labels.count(end) == 1


def test_reasoning_is_learnt_but_not_the_empty_block_that_the_prompt_ends_with(tiny: Callable[[str], Path]) -> None:
    encoder = Encoder.from_checkpoint(tiny("4.5"))
    assert learnt(encoder, sample("Which?", "3")) == ["3<|im_end|>"]
    thought = "<think>\nIt has a gap.\n</think>\n\n3"
    assert learnt(encoder, sample("Which?", thought)) == [f"{thought}<|im_end|>"]


def test_a_image_within_the_working_area_is_an_overview(encoder: Encoder) -> None:
    # 168 × 112 pixels where 4 × 4 patches are merged into a token.
    overview = 16 if encoder.generation.fixed_tokens else 6
    one = sample((0, "\nWhat?"), "3", images=(SMALL,))
    assert shown(encoder, one) == image(encoder, 0, overview) + "\nWhat?"


def test_a_large_image_is_an_overview_and_rows_of_slices(encoder: Encoder) -> None:
    count = 16 if encoder.generation.fixed_tokens else 4
    one = sample((0, "\nWhat?"), "3", images=(WIDE,))
    assert encoder.plan(one)[0].grid == (2, 3)
    assert shown(encoder, one) == image(encoder, 0, count, (2, 3), count) + "\nWhat?"


def test_images_are_numbered_as_they_are_shown_whatever_their_order_in_the_list(encoder: Encoder) -> None:
    overview, count = (16, 16) if encoder.generation.fixed_tokens else (6, 4)
    two = sample((1, "\n", 0, "\nCompare."), "3", images=(WIDE, SMALL))
    small, wide = image(encoder, 0, overview), image(encoder, 1, count, (2, 3), count)
    assert shown(encoder, two) == f"{small}\n{wide}\nCompare."


def test_images_stand_where_the_data_puts_them(encoder: Encoder) -> None:
    talk = sample(("Look:\n", 0), "Yes.", ("And\n", 1, "\n\nhere?"), "No.", images=(WIDE, WIDE))
    count = 16 if encoder.generation.fixed_tokens else 4
    text = encoder.tokenizer.decode(encoder.encode(talk).input_ids)
    turns = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]]
    first, second = (image(encoder, number, count, (2, 3), count) for number in (0, 1))
    if encoder.generation.image_content == "text":
        assert turns == [f"Look:\n{first}", f"And\n{second}\n\nhere?"]
    else:
        # This template writes a line break after an image itself, and none before.
        assert turns == [f"Look:{first}\n", f"And{second}\n\nhere?"]


def test_line_breaks_at_the_ends_of_a_turn_stay(encoder: Encoder) -> None:
    talk = sample(("\nLook:\n", 0, "\nWhat?\n"), "3", images=(SMALL,))
    before, after = shown(encoder, talk).split("<image_id>")[0], shown(encoder, talk).split("</image>")[1]
    assert before.startswith("\nLook:")
    assert after == "\nWhat?\n"


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_a_processor_shows_images_numbers_unless_it_says_otherwise(
    version: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    one = sample((0, "\nWhat?"), "3", images=(WIDE,))
    texts = {}
    for told in (None, True, False):
        folder = shutil.copytree(tiny(version), tmp_path / f"told {told}")
        edit_image_settings(folder, use_image_id=told)
        texts[told] = shown(Encoder.from_checkpoint(folder), one)
    assert texts[None] == texts[True]
    assert texts[True] == f"<image_id>0</image_id>{texts[False]}"


def test_a_slice_of_the_published_size_takes_64_tokens(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("4.6"), tmp_path / "checkpoint")
    edit_image_settings(folder, scale_resolution=448)
    encoder = Encoder.from_checkpoint(folder)
    large = ImageRef(uri="large.png", sha256="", width=896, height=896)
    one = sample((0, "\nWhat?"), "3", images=(large,))
    assert shown(encoder, one) == image(encoder, 0, 64, (2, 2), 64) + "\nWhat?"


def test_finer_merging_gives_a_slice_four_times_the_tokens(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("4.6"), tmp_path / "checkpoint")
    edit_image_settings(folder, downsample_mode="4x")
    encoder = Encoder.from_checkpoint(folder)
    one = sample((0, "\nWhat?"), "3", images=(WIDE,))
    patches = [rows * columns for rows, columns in encoder.plan(one)[0].target_sizes]
    text = shown(encoder, one)
    slices = [part.split("</slice>")[0] for part in text.split("<slice>")[1:]]
    token = encoder.generation.image_token
    assert [text.split("</image>")[0].count(token), *(part.count(token) for part in slices)] == [
        number // 4 for number in patches
    ]


def test_the_number_of_slices_can_be_lowered(encoder: Encoder, tiny: Callable[[str], Path]) -> None:
    folder = tiny(encoder.generation.version)
    one = sample((0, "\nWhat?"), "3", images=(WIDE,))
    assert encoder.slicing.max_slice_nums == 9
    assert "<slice>" not in shown(Encoder.from_checkpoint(folder, max_slice_nums=1), one)


def test_a_prompt_ends_where_the_last_answer_begins(encoder: Encoder) -> None:
    talk = sample("Hello", "Yes?", (0, "\nWhat?"), "A digit.", images=(SMALL,))
    prompt = encoder.encode_prompt(talk)
    assert encoder.encode(talk).input_ids[: len(prompt)] == prompt
    text = encoder.tokenizer.decode(prompt)
    assert "Yes?<|im_end|>" in text
    assert text.endswith(f"What?<|im_end|>\n<|im_start|>assistant\n{encoder.generation.empty_thinking}")


def test_a_question_is_its_own_prompt(encoder: Encoder) -> None:
    asked = encoder.encode_prompt(sample("Hello", "Yes?", "What?"))
    assert asked == encoder.encode_prompt(sample("Hello", "Yes?", "What?", "A digit."))


def test_reasoning_is_asked_for_only_when_wanted(encoder: Encoder) -> None:
    thinking = encoder.tokenizer.decode(encoder.encode_prompt(sample("Which?"), enable_thinking=True))
    assert thinking.endswith("<think>\n" if encoder.generation.version == "4.5" else "assistant\n")


def test_generation_stops_at_the_end_of_the_turn_and_of_the_text(encoder: Encoder) -> None:
    second = "</s>" if encoder.generation.version == "4.0" else "<|endoftext|>"
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_token_ids) == ["<|im_end|>", second]


def test_padding_is_the_tokenizers_own_token_or_else_the_first(encoder: Encoder) -> None:
    expected = 0 if encoder.generation.version == "4.0" else encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert encoder.pad_token_id == expected


@pytest.mark.parametrize("token", ["<|im_end|>", "<image>", "<|im_start|>assistant"])
def test_no_text_can_hold_a_mark(encoder: Encoder, token: str) -> None:
    for talk, role in ((sample(f"a {token}", "b"), "user"), (sample("a", f"b{token}c"), "assistant")):
        with pytest.raises(SampleError, match=role) as caught:
            encoder.encode(talk)
        assert caught.value.reason == "special_token"
        assert token.removesuffix("assistant") in str(caught.value)


def test_each_missing_special_token_is_named(encoder: Encoder, tmp_path: Path) -> None:
    marks = ["<image>", "</image>", "<slice>", "</slice>", encoder.generation.image_token, "<|im_end|>"]

    class Poor:
        def get_vocab(self) -> dict[str, int]:
            return {"<image>": 0, "a": 1}

    with pytest.raises(UserError) as caught:
        replace(encoder, tokenizer=Poor()).check_special_tokens(tmp_path)  # type: ignore[arg-type]
    assert f"lacks the special tokens {', '.join(marks[1:])}; use" in str(caught.value)
    assert f"MiniCPM-V {encoder.generation.version}." in str(caught.value)


def test_a_template_that_loses_images_is_refused(tiny: Callable[[str], Path]) -> None:
    encoder = Encoder.from_checkpoint(tiny("2.6"))
    encoder.tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(UserError, match="wrote 0 image marks for 2 images"):
        encoder.encode(sample((0, "\n", 1, "\nWhat?"), "3", images=(SMALL, SMALL)))


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_a_tokenizer_is_checked_when_it_is_read(version: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(version), tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("</slice>", "</slyce>"))
    with pytest.raises(UserError, match="lacks the special tokens </slice>; use"):
        Encoder.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError("\nno such file\nlook at\nhttps://…"), "no such file"), (ValueError(" "), "ValueError")],
)
def test_a_tokenizer_that_cannot_be_read_is_explained_in_a_line(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(UserError, match=rf"the tokenizer cannot be loaded \({told}\); the folder needs"):
        Encoder.from_checkpoint(tiny("2.6"))


def edit_image_settings(folder: Path, **fields: object) -> None:
    """None takes a field out."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            document = json.loads((folder / name).read_text())
            settings = document.get("image_processor", document)
            settings.update(fields)
            for field in [field for field, value in fields.items() if value is None]:
                del settings[field]
            (folder / name).write_text(json.dumps(document))
