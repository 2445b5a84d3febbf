"""Supervised tokens and image tokens, compared with expected text, with tiny tokenizers of every generation."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from minicpmv_finetune.data.samples import ImageRef, Sample, SampleError, Turn
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.generations import GENERATIONS
from minicpmv_finetune.minicpmv.model_input import IGNORED_LABEL

VERSIONS = [generation.version for generation in GENERATIONS]
SMALL = ImageRef(uri="small.png", sha256="", width=100, height=60)
PARITY = Path(__file__).parents[1] / "parity" / "golden"
WIDE = ImageRef(uri="wide.png", sha256="", width=300, height=200)  # two rows of three slices


@pytest.fixture(params=VERSIONS)
def encoder(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Encoder:
    return Encoder.from_checkpoint(tiny(request.param))


def sample(*turns: str | tuple[str | int, ...], images: tuple[ImageRef, ...] = (), system: str = "") -> Sample:
    """Build a sample whose turns alternate between user and assistant, beginning with the user."""
    alternating = [
        Turn(role="assistant" if number % 2 else "user", parts=(turn,) if isinstance(turn, str) else turn)
        for number, turn in enumerate(turns)
    ]
    opening = [Turn(role="system", parts=(system,))] if system else []
    return Sample(id="s", images=images, turns=(*opening, *alternating), source="data.json")


def supervised(encoder: Encoder, conversation: Sample) -> list[str]:
    """Return each run of supervised tokens as text."""
    encoded = encoder.encode(conversation)
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in {token, IGNORED_LABEL}
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED_LABEL:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [decode(encoder, run) for run in runs if run]


def decode(encoder: Encoder, ids: list[int]) -> str:
    return str(encoder.tokenizer.decode(ids))


def first_user_turn(encoder: Encoder, conversation: Sample) -> str:
    """Return the text of the first user turn that the model receives."""
    text = decode(encoder, encoder.encode(conversation).input_ids)
    return text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def image(encoder: Encoder, number: int, overview: int, grid: tuple[int, int] = (0, 0), each: int = 0) -> str:
    """Return the published tokens of an image: its number, the overview, and a line for each row of slices."""
    token = encoder.generation.image_token
    row = f"<slice>{token * each}</slice>" * grid[1]
    return f"<image_id>{number}</image_id><image>{token * overview}</image>" + "\n".join([row] * grid[0])


def test_only_answers_and_the_ends_of_their_turns_are_supervised(encoder: Encoder) -> None:
    conversation = sample(
        (0, "\nWhat is it?"), "A digit.", "Which\none?", "It is\n\n3 – or 8.", images=(WIDE,), system="Be brief."
    )
    assert supervised(encoder, conversation) == ["A digit.<|im_end|>", "It is\n\n3 – or 8.<|im_end|>"]


def test_a_line_break_after_the_last_turn_changes_no_label(encoder: Encoder) -> None:
    text = decode(encoder, encoder.encode(sample("Which?", "3")).input_ids).removeprefix("<s>")
    assert text.endswith("assistant\n" + encoder.generation.empty_thinking + "3<|im_end|>\n")
    whole, cut_off = encoder.encode_text(text), encoder.encode_text(text.removesuffix("\n"))
    assert cut_off.labels == whole.labels[: len(cut_off.labels)]
    assert set(whole.labels[len(cut_off.labels) :]) == {IGNORED_LABEL}


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|"), min_size=1, max_size=30)


@pytest.mark.parametrize("version", VERSIONS)
@given(questions=st.lists(WORDS, min_size=1, max_size=3), answers=st.lists(WORDS, min_size=3, max_size=3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_supervised_text_is_part_of_the_assistants_turns(
    version: str, questions: list[str], answers: list[str], tiny: Callable[[str], Path]
) -> None:
    encoder = _encoder(tiny(version))
    turns = [turn for pair in zip(questions, answers, strict=False) for turn in pair]
    end = encoder.generation.end_of_turn
    runs = supervised(encoder, sample(*turns, images=()))
    assert len(runs) == len(questions)
    for run, answer in zip(runs, answers, strict=False):
        # Line breaks at the beginning are removed and a tokenizer may compose characters, but no more is changed.
        expected = re.sub(r"^\s*[\r\n]+", "", answer)
        assert normalize("NFC", run) == normalize("NFC", expected) + end


@cache
def _encoder(folder: Path) -> Encoder:
    return Encoder.from_checkpoint(folder)


BEGINNINGS = (
    "",
    "",
    "\n",
    "\n\n",
    " \n",
    "\r\n",
    "\t",
    "  ",
    "\u2028\n",
    "\u3000",
    "\u0301",
    "\x85",
    "\u200d",
    "数\n",
    "...\n",
)
ANSWERS = st.builds("".join, st.tuples(st.sampled_from(BEGINNINGS), WORDS.filter(lambda text: text.strip())))
TOKENIZERS = [*VERSIONS, *(f"published {version}" for version in ("2.6", "4.0", "4.5"))]


@pytest.mark.parametrize("version", TOKENIZERS)
@given(answers=st.lists(ANSWERS, min_size=1, max_size=3), reasoning=st.just("") | ANSWERS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_training_begins_with_the_prompt_and_supervises_every_token_after_it(
    version: str, answers: list[str], reasoning: str, tiny: Callable[[str], Path]
) -> None:
    published = PARITY / f"minicpmv-{version[-3:].replace('.', '_')}" / "checkpoint"
    encoder = _encoder(published if version.startswith("published") else tiny(version))
    if reasoning:
        answers = [*answers[:-1], f"<think>{reasoning}</think>{answers[-1]}"]
    conversation = sample(*(turn for answer in answers for turn in ("\nWhich?\n", answer)))
    # The tiny 4.0, whose tokenizer splits no words, has a token of a line break and "<".
    assume(version != "4.0" or not any(answer.lstrip().startswith("<") for answer in answers))
    prompt, encoded = encoder.encode_prompt(conversation), encoder.encode(conversation)
    end = encoder.tokenizer.get_vocab()[encoder.generation.end_of_turn]
    assert encoded.input_ids[: len(prompt)] == prompt
    answer_ids = encoded.input_ids[len(prompt) : encoded.input_ids.index(end, len(prompt)) + 1]
    assert encoded.labels[len(prompt) : len(prompt) + len(answer_ids)] == answer_ids
    # What the model is trained to answer is what its answer is compared with.
    thinks = encoder.asks_for_reasoning(conversation)
    answered = encoder.split_reasoning(encoder.decode(answer_ids[:-1]), is_open=thinks)[1]
    assert answered == encoder.normalize_answer(conversation.turns[-1].text)


@pytest.mark.parametrize("version", TOKENIZERS)
def test_an_answer_is_compared_as_the_tokenizer_writes_it(version: str, tiny: Callable[[str], Path]) -> None:
    published = PARITY / f"minicpmv-{version[-3:].replace('.', '_')}" / "checkpoint"
    encoder = _encoder(published if version.startswith("published") else tiny(version))
    for text in ("cafe\u0301 10 km", "각", "A\u030a", "Ω", "数字", "<think> a", "a </think> b"):
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encoder.normalize_answer(f" {text}\n") == encoder.decode(ids)
        assert encoder.normalize_answer(encoder.normalize_answer(text)) == encoder.normalize_answer(text)


def test_an_answer_that_the_tokenizer_joins_with_the_prompt_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(SampleError, match="joins the beginning of the answer '<think> is") as caught:
        _encoder(tiny("4.0")).encode(sample("Which?", "<think> is a word."))
    assert caught.value.reason == "joined_answer"


def test_a_question_without_an_answer_has_no_supervised_token(encoder: Encoder) -> None:
    assert supervised(encoder, sample("What is it?")) == []


@pytest.mark.parametrize("answer", ["3", " 3", "3\n", "assistant\n", "数字"])
def test_the_first_and_last_character_of_an_answer_are_supervised(encoder: Encoder, answer: str) -> None:
    ids = encoder.encode(sample("Which?", answer))
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert supervised(encoder, sample("Which?", answer)) == [f"{answer}<|im_end|>"]
    assert [label for label in ids.labels if label != IGNORED_LABEL][-1] == end
    assert ids.labels.count(end) == 1


def test_reasoning_is_supervised_but_not_the_empty_block_of_the_prompt(tiny: Callable[[str], Path]) -> None:
    encoder = Encoder.from_checkpoint(tiny("4.5"))
    assert supervised(encoder, sample("Which?", "3")) == ["3<|im_end|>"]
    for text in ("<think>\nIt has a gap.\n</think>\n\n3", " <think>It has a gap. </think> \n3"):
        assert supervised(encoder, sample("Which?", text)) == ["<think>\nIt has a gap.\n</think>\n\n3<|im_end|>"]
        assert encoder.normalize_answer(text) == "3"
    for text in ("<think>\n\n</think>\n\n3", "<think></think>3"):
        assert supervised(encoder, sample("Which?", text)) == ["3<|im_end|>"]
        assert not encoder.asks_for_reasoning(sample("Which?", text))


def test_the_prompt_requests_reasoning_if_the_answer_has_some(encoder: Encoder) -> None:
    conversation = sample("Which?", "<think>\nIt has a gap.\n</think>\n\n3")
    has_blocks = encoder.generation.version == "4.5"
    text = decode(encoder, encoder.encode_prompt(conversation))
    assert text.endswith("assistant\n<think>\n" if has_blocks else "assistant\n")
    # Other generations have no think blocks: the block is text like any other.
    whole = conversation.turns[-1].text
    assert encoder.normalize_answer(whole) == ("3" if has_blocks else whole)


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "answer"),
    [
        ("3", False, "", "3"),
        ("a </think> b", False, "", "a </think> b"),
        ("<think>it ends early", False, "", "<think>it ends early"),
        ("<think>\na gap\n</think>\n\n3", False, "a gap", "3"),
        ("a gap\n</think>\n\n3", True, "a gap", "3"),
        ("<think>\na gap</think>3", True, "a gap", "3"),
        ("it ends early", True, "it ends early", ""),
    ],
)
def test_reasoning_is_split_from_the_answer(
    text: str, is_open: bool, reasoning: str, answer: str, tiny: Callable[[str], Path]
) -> None:
    assert _encoder(tiny("4.5")).split_reasoning(text, is_open) == (reasoning, answer)


@pytest.mark.parametrize(
    "text", ["a </think> b", "<think>a</think>b</think>c", "<think>a<think>b</think>c", "</think>3"]
)
def test_an_answer_that_the_template_would_rewrite_is_refused(text: str, tiny: Callable[[str], Path]) -> None:
    for turns in (("Which?", text), ("Which?", text, "Sure?", "Yes.")):
        with pytest.raises(SampleError, match="takes for the end of reasoning; write reasoning once") as caught:
            _encoder(tiny("4.5")).encode(sample(*turns))
        assert caught.value.reason == "special_token"
    assert supervised(_encoder(tiny("2.6")), sample("Which?", text)) == [f"{text}<|im_end|>"]


def test_an_image_within_the_working_area_is_an_overview_only(encoder: Encoder) -> None:
    # 168 × 112 pixels where 4 × 4 patches are merged into a token.
    overview = 16 if encoder.generation.fixed_tokens else 6
    one = sample((0, "\nWhat?"), "3", images=(SMALL,))
    assert first_user_turn(encoder, one) == image(encoder, 0, overview) + "\nWhat?"


def test_a_large_image_is_an_overview_and_rows_of_slices(encoder: Encoder) -> None:
    count = 16 if encoder.generation.fixed_tokens else 4
    one = sample((0, "\nWhat?"), "3", images=(WIDE,))
    assert encoder.plan(one)[0].grid == (2, 3)
    assert first_user_turn(encoder, one) == image(encoder, 0, count, (2, 3), count) + "\nWhat?"


def test_images_are_numbered_in_the_order_of_their_marks(encoder: Encoder) -> None:
    overview, count = (16, 16) if encoder.generation.fixed_tokens else (6, 4)
    two = sample((1, "\n", 0, "\nCompare."), "3", images=(WIDE, SMALL))
    small, wide = image(encoder, 0, overview), image(encoder, 1, count, (2, 3), count)
    assert first_user_turn(encoder, two) == f"{small}\n{wide}\nCompare."


def test_image_tokens_are_at_the_positions_of_the_marks(encoder: Encoder) -> None:
    conversation = sample(("Look:\n", 0), "Yes.", ("And\n", 1, "\n\nhere?"), "No.", images=(WIDE, WIDE))
    count = 16 if encoder.generation.fixed_tokens else 4
    text = decode(encoder, encoder.encode(conversation).input_ids)
    turns = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]]
    first, second = (image(encoder, number, count, (2, 3), count) for number in (0, 1))
    if encoder.generation.image_content == "text":
        assert turns == [f"Look:\n{first}", f"And\n{second}\n\nhere?"]
    else:
        # This template itself writes a line break after an image, and none before it.
        assert turns == [f"Look:{first}\n", f"And{second}\n\nhere?"]


def test_line_breaks_at_both_ends_of_a_turn_are_kept(encoder: Encoder) -> None:
    conversation = sample(("\nLook:\n", 0, "\nWhat?\n"), "3", images=(SMALL,))
    text = first_user_turn(encoder, conversation)
    before, after = text.split("<image_id>")[0], text.split("</image>")[1]
    assert before.startswith("\nLook:")
    assert after == "\nWhat?\n"


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_images_are_numbered_unless_the_processor_disables_it(
    version: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    one = sample((0, "\nWhat?"), "3", images=(WIDE,))
    texts = {}
    for use_image_id in (None, True, False):
        folder = shutil.copytree(tiny(version), tmp_path / f"use_image_id {use_image_id}")
        edit_image_settings(folder, use_image_id=use_image_id)
        texts[use_image_id] = first_user_turn(Encoder.from_checkpoint(folder), one)
    assert texts[None] == texts[True]
    assert texts[True] == f"<image_id>0</image_id>{texts[False]}"


def test_a_slice_of_the_published_size_has_64_tokens(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("4.6"), tmp_path / "checkpoint")
    edit_image_settings(folder, scale_resolution=448)
    encoder = Encoder.from_checkpoint(folder)
    large = ImageRef(uri="large.png", sha256="", width=896, height=896)
    one = sample((0, "\nWhat?"), "3", images=(large,))
    assert first_user_turn(encoder, one) == image(encoder, 0, 64, (2, 2), 64) + "\nWhat?"


def test_downsample_mode_4x_gives_four_times_as_many_tokens(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("4.6"), tmp_path / "checkpoint")
    edit_image_settings(folder, downsample_mode="4x")
    encoder = Encoder.from_checkpoint(folder)
    one = sample((0, "\nWhat?"), "3", images=(WIDE,))
    patches = [rows * columns for rows, columns in encoder.plan(one)[0].target_sizes]
    text = first_user_turn(encoder, one)
    slices = [part.split("</slice>")[0] for part in text.split("<slice>")[1:]]
    token = encoder.generation.image_token
    assert [text.split("</image>")[0].count(token), *(part.count(token) for part in slices)] == [
        number // 4 for number in patches
    ]


def test_the_number_of_slices_can_be_lowered(encoder: Encoder, tiny: Callable[[str], Path]) -> None:
    folder = tiny(encoder.generation.version)
    one = sample((0, "\nWhat?"), "3", images=(WIDE,))
    assert encoder.slicing.max_slice_nums == 9
    assert "<slice>" not in first_user_turn(Encoder.from_checkpoint(folder, max_slice_nums=1), one)


def test_a_prompt_ends_where_the_last_answer_begins(encoder: Encoder) -> None:
    conversation = sample("Hello", "Yes?", (0, "\nWhat?"), "A digit.", images=(SMALL,))
    prompt = encoder.encode_prompt(conversation)
    assert encoder.encode(conversation).input_ids[: len(prompt)] == prompt
    text = decode(encoder, prompt)
    assert "Yes?<|im_end|>" in text
    assert text.endswith(f"What?<|im_end|>\n<|im_start|>assistant\n{encoder.generation.empty_thinking}")


def test_the_prompt_is_the_same_with_and_without_the_last_answer(encoder: Encoder) -> None:
    asked = encoder.encode_prompt(sample("Hello", "Yes?", "What?"))
    assert asked == encoder.encode_prompt(sample("Hello", "Yes?", "What?", "A digit."))


def test_the_prompt_requests_reasoning_only_if_enabled(encoder: Encoder) -> None:
    thinking = decode(encoder, encoder.encode_prompt(sample("Which?"), enable_thinking=True))
    assert thinking.endswith("<think>\n" if encoder.generation.version == "4.5" else "assistant\n")


def test_generation_stops_at_the_end_of_the_turn_and_of_the_text(encoder: Encoder) -> None:
    second = "</s>" if encoder.generation.version == "4.0" else "<|endoftext|>"
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_token_ids) == ["<|im_end|>", second]


def test_the_padding_token_is_the_tokenizers_or_else_token_0(encoder: Encoder) -> None:
    expected = 0 if encoder.generation.version == "4.0" else encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert encoder.pad_token_id == expected


GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<point>", "</point>", "<|object_ref_start|>")


def test_special_tokens_that_users_train_on_are_words_of_an_answer(encoder: Encoder) -> None:
    encoder.tokenizer.add_special_tokens({"additional_special_tokens": list(GROUNDING)})
    for token in GROUNDING:
        ids = encoder.tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]
        assert encoder.tokenizer.convert_tokens_to_ids(token) in ids
        text = f"a{token} 1 2 3"
        assert supervised(encoder, sample(f"Where is {token}?", text)) == [f"{text}<|im_end|>"]


def test_an_answer_without_loss_is_context(encoder: Encoder) -> None:
    turns = sample("a?", "first", "b?", "second", "c?", "third").turns
    untrained = [turn.model_copy(update={"loss": turn.text != "first"}) for turn in turns]
    conversation = sample("a?").model_copy(update={"turns": tuple(untrained)})
    assert supervised(encoder, conversation) == ["second<|im_end|>", "third<|im_end|>"]
    whole = encoder.encode(conversation.model_copy(update={"turns": turns}))
    assert whole.input_ids == encoder.encode(conversation).input_ids


def test_a_template_that_drops_answers_is_refused_where_some_have_no_loss(tiny: Callable[[str], Path]) -> None:
    encoder = Encoder.from_checkpoint(tiny("2.6"))
    encoder.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    first, *others = sample("a?", "b", "c?", "d").turns
    turns = (first, others[0].model_copy(update={"loss": False}), *others[1:])
    with pytest.raises(UserError, match="wrote 0 answers for 2"):
        encoder.encode(sample("a?").model_copy(update={"turns": turns}))


@pytest.mark.parametrize("token", ["<|im_end|>", "<image>", "<|im_start|>assistant", "</slice>", "<image_id>", "<unk>"])
def test_text_with_a_token_of_the_format_is_refused(encoder: Encoder, token: str) -> None:
    for conversation, role in ((sample(f"a {token}", "b"), "user"), (sample("a", f"b{token}c"), "assistant")):
        with pytest.raises(SampleError, match=role) as caught:
            encoder.encode(conversation)
        assert caught.value.reason == "special_token"
        assert token.removesuffix("assistant") in str(caught.value)


def test_the_error_names_each_missing_special_token(encoder: Encoder, tmp_path: Path) -> None:
    marks = ["<image>", "</image>", "<slice>", "</slice>", encoder.generation.image_token, "<|im_end|>"]

    class SmallTokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"<image>": 0, "a": 1}

    with pytest.raises(UserError) as caught:
        replace(encoder, tokenizer=SmallTokenizer()).check_special_tokens(tmp_path)  # type: ignore[arg-type]
    assert f"lacks the special tokens {', '.join(marks[1:])}; use" in str(caught.value)
    assert f"MiniCPM-V {encoder.generation.version}." in str(caught.value)


def test_a_template_that_drops_images_is_refused(tiny: Callable[[str], Path]) -> None:
    encoder = Encoder.from_checkpoint(tiny("2.6"))
    encoder.tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(UserError, match="wrote 0 image marks for 2 images"):
        encoder.encode(sample((0, "\n", 1, "\nWhat?"), "3", images=(SMALL, SMALL)))
    encoder.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<unk>{% endfor %}"
    with pytest.raises(UserError, match="The chat template wrote <unk>, which stands for an image, without one"):
        encoder.encode(sample((0, "\nWhat?"), "3", images=(SMALL,)))


@pytest.mark.parametrize("version", ["2.6", "4.6"])
def test_a_tokenizer_is_checked_when_it_is_loaded(version: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(version), tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("</slice>", "</slyce>"))
    with pytest.raises(UserError, match="lacks the special tokens </slice>; use"):
        Encoder.from_checkpoint(folder)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("other_class", [None, "Qwen2TokenizerFast"])
def test_the_tokenizer_is_the_one_that_transformers_chooses(
    other_class: str | None, version: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny(version), tmp_path / "checkpoint")
    if other_class:
        configuration = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": other_class}
        configuration.pop("auto_map", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    chosen, ours = AutoTokenizer.from_pretrained(folder), Encoder.from_checkpoint(folder).tokenizer
    assert type(chosen) is type(ours)
    assert chosen.backend_tokenizer.to_str() == ours.backend_tokenizer.to_str()
    for attribute in ("special_tokens_map", "chat_template", "padding_side", "model_max_length"):
        assert getattr(chosen, attribute) == getattr(ours, attribute)


def test_image_tokens_are_repeated_after_the_text_is_tokenized(encoder: Encoder) -> None:
    conversation = sample((0, "\nor", 1, "?"), ("The one like ", 0, "."), "Sure?", "Yes.", images=(WIDE, SMALL))
    encoded = encoder.encode(conversation)
    assert encoded == encoder.encode_text(decode(encoder, encoded.input_ids).removeprefix("<s>"))
    assert encoder.encode_prompt(conversation) == encoded.input_ids[: len(encoder.encode_prompt(conversation))]


def test_a_token_of_the_same_id_as_an_image_token_is_not_repeated(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """2.6's image token is also the one that a vocabulary without bytes has for unknown characters."""
    folder = shutil.copytree(tiny("2.6"), tmp_path / "checkpoint")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["unk_token"] = "<unk>"
    unknown = document["model"]["vocab"].pop("~")
    document["model"]["vocab"]["never"] = unknown
    (folder / "tokenizer.json").write_text(json.dumps(document))
    encoder = Encoder.from_checkpoint(folder)
    image_token = encoder.tokenizer.get_vocab()["<unk>"]

    def count(*turns: str | tuple[str | int, ...]) -> int:
        return encoder.encode(sample(*turns, images=(SMALL,))).input_ids.count(image_token)

    assert count(("~", 0, "~"), "~") == count((0,), "3") + 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("\nno such file\nlook at\nhttps://…"), "no such file"), (ValueError(" "), "ValueError")],
)
def test_a_tokenizer_that_cannot_be_loaded_is_a_one_line_error(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", fail)
    with pytest.raises(UserError, match=rf"the tokenizer cannot be loaded \({reason}\); the folder needs"):
        Encoder.from_checkpoint(tiny("2.6"))


def edit_image_settings(folder: Path, **fields: object) -> None:
    """Set fields of the image processor's settings; None removes a field."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            document = json.loads((folder / name).read_text())
            settings = document.get("image_processor", document)
            settings.update(fields)
            for field in [field for field, value in fields.items() if value is None]:
                del settings[field]
            (folder / name).write_text(json.dumps(document))
