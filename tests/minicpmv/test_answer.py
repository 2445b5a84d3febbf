from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from minicpmv_finetune.data.samples import ImageRef, Sample, Turn, open_image
from minicpmv_finetune.minicpmv.answer import Answer, answer
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import ModelInput
from minicpmv_finetune.minicpmv.slicing import cut_slices


@pytest.fixture
def model(tiny_46: Path) -> Any:
    return load_model(tiny_46, torch.float32)[0]


@pytest.fixture(scope="module")
def encoder(tiny_46: Path) -> Encoder:
    return Encoder.from_checkpoint(tiny_46)


@pytest.fixture(scope="module")
def samples(digits: Path) -> list[Sample]:
    """Prompts of different lengths: with one image, no image, a sliced image, two images, and with earlier turns."""
    large = digits / "large.png"
    Image.linear_gradient("L").resize((300, 200)).save(large)
    images = [_image(path) for path in (*sorted((digits / "images").glob("*.png"))[:3], large)]
    groups: list[tuple[ImageRef, ...]] = [(images[0],), (), (images[3],), (images[1], images[2]), (images[2],)]
    samples = []
    for number, group in enumerate(groups):
        parts = [*range(len(group)), f"Which digit is this?{' Look well.' * number}"]
        turns = [Turn(role="user", parts=tuple(parts))]
        if number == 4:
            turns += [Turn(role="assistant", parts=("A 3.",)), Turn(role="user", parts=("Are you sure?",))]
        turns.append(Turn(role="assistant", parts=("The expected answer.",)))
        samples.append(Sample(id=str(number), images=group, turns=tuple(turns), source="test"))
    return samples


def _image(path: Path) -> ImageRef:
    width, height = Image.open(path).size
    return ImageRef(uri=str(path), sha256=sha256(path.read_bytes()).hexdigest(), width=width, height=height)


@torch.no_grad()
def greedy_tokens(model: Any, encoder: Encoder, sample: Sample, count: int) -> list[int]:
    """Decode greedily without cache, padding or stop tokens: one forward pass over all tokens for each new token."""
    plans = encoder.plan(sample)
    slices = [
        pixels
        for image, plan in zip(sample.images, plans, strict=True)
        for pixels in cut_slices(open_image(image), plan, encoder.slicing)
    ]
    ids = encoder.encode_prompt(sample)
    start = len(ids)
    for _ in range(count):
        inputs = [ModelInput("", ids, [], slices)]
        batch = collate(inputs, encoder.pad_token_id, encoder.slicing.patch_size, "right", encoder.slicing.resampler)
        ids = [*ids, int(model(**batch).logits[0, -1].argmax())]
    return ids[start:]


def texts(answers: Sequence[Answer]) -> list[str]:
    return [answered.text for answered in answers]


def test_batched_answers_equal_single_answers_and_plain_greedy_decoding(
    model: Any, encoder: Encoder, samples: list[Sample]
) -> None:
    done: list[int] = []
    batched = answer(model, encoder, samples, max_new_tokens=12, batch_size=3, on_done=done.append)
    assert batched == answer(model, encoder, samples, max_new_tokens=12, batch_size=1)
    assert sum(done) == 5
    for sample, answered in zip(samples, batched, strict=True):
        tokens = greedy_tokens(model, encoder, sample, 12)
        end = encoder.tokenizer.convert_tokens_to_ids(encoder.generation.end_of_turn)
        kept = tokens[: tokens.index(end)] if end in tokens else tokens
        expected = str(encoder.tokenizer.decode(kept, skip_special_tokens=False)).strip()
        assert answered == Answer(expected, len(kept) + (end in tokens), hit_limit=end not in tokens)


@pytest.mark.parametrize("version", ["2.6", "4.0", "4.5", "4.6", "4.7"])
def test_rows_that_leave_and_enter_and_share_an_image_change_no_answer(
    version: str, tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    model: Any = load_model(tiny(version), torch.float32)[0]
    encoder = Encoder.from_checkpoint(tiny(version))
    several = [
        sample.model_copy(update={"turns": (Turn(role="user", parts=(*range(len(sample.images)), question)),)})
        for sample in samples[:4]
        for question in ("Which digit is this?", "Is it dark?", "Which digit is this, and how many lines has it?")
    ]
    free = [greedy_tokens(model, encoder, sample, 6) for sample in several]
    model.generation_config.eos_token_id = sorted({tokens[number % 6] for number, tokens in enumerate(free)})
    alone = answer(model, encoder, several, max_new_tokens=6, batch_size=1)
    assert len({answered.new_tokens for answered in alone}) > 1
    assert answer(model, encoder, several, max_new_tokens=6, batch_size=4) == alone
    for tokens, answered in zip(free, alone, strict=True):
        kept = tokens if answered.hit_limit else tokens[: answered.new_tokens - 1]
        assert encoder.split_reasoning(encoder.decode(kept))[1] == answered.text


def test_questions_about_one_image_encode_it_once(
    model: Any, encoder: Encoder, samples: list[Sample], count_slices: Callable[[Any], list[int]]
) -> None:
    turns = [(Turn(role="user", parts=(0, f"Which digit is this, in {number} words?")),) for number in range(4)]
    several = [samples[0].model_copy(update={"turns": questions}) for questions in turns]
    slices = count_slices(model)
    answer(model, encoder, several, max_new_tokens=2)
    answer(model, encoder, several, max_new_tokens=2, batch_size=1)
    assert slices == [1, 1, 1, 1, 1]


def test_marks_that_users_train_on_are_part_of_an_answer_and_stop_tokens_are_not(
    model: Any, encoder: Encoder, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.tokenizer.add_special_tokens({"additional_special_tokens": ["<box>", "</box>"]})
    ids = encoder.tokenizer("<box>1 2 3 4</box><|im_end|>")["input_ids"]
    monkeypatch.setattr("minicpmv_finetune.minicpmv.answer.decode_greedily", lambda *_: [(0, ids)])
    (answered,) = answer(model, encoder, samples[:1])
    assert answered.text.removeprefix("<s>") == "<box>1 2 3 4</box>"
    assert (answered.new_tokens, answered.hit_limit) == (len(ids), False)


@pytest.mark.parametrize(
    ("expected", "generated", "answered"),
    [
        ("<think>a</think>3", "A gap.\n</think>\n\n3<|im_end|>", ("3", "A gap.")),
        ("<think>a</think>3", "A gap, and", ("", "A gap, and")),
        ("3", "<think>\nA gap.\n</think>\n\n3<|im_end|>", ("3", "A gap.")),
        ("3", "a </think> b<|im_end|>", ("a </think> b", "")),
    ],
)
def test_reasoning_is_no_part_of_the_answer(
    model: Any,
    expected: str,
    generated: str,
    answered: tuple[str, str],
    tiny: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = Encoder.from_checkpoint(tiny("4.5"))
    ids = encoder.tokenizer(generated)["input_ids"]
    monkeypatch.setattr("minicpmv_finetune.minicpmv.answer.decode_greedily", lambda *_: [(0, ids)])
    turns = (Turn(role="user", parts=("Which?",)), Turn(role="assistant", parts=(expected,)))
    (found,) = answer(model, encoder, [Sample(id="s", images=(), turns=turns, source="test")])
    assert (found.text, found.reasoning) == answered


def test_an_answer_stops_at_the_end_of_the_turn(model: Any, encoder: Encoder, samples: list[Sample]) -> None:
    tokens = greedy_tokens(model, encoder, samples[0], 6)
    last = next(place for place in range(1, 6) if tokens[place] not in tokens[:place])
    ending = str(encoder.tokenizer.convert_ids_to_tokens(tokens[last]))
    stopping = replace(encoder, generation=replace(encoder.generation, end_of_turn=ending))
    stopped = answer(model, stopping, samples[:1], max_new_tokens=12)[0]
    assert (stopped.new_tokens, stopped.hit_limit) == (last + 1, False)


def test_an_answer_stops_at_the_checkpoints_stop_tokens(model: Any, encoder: Encoder, samples: list[Sample]) -> None:
    first = greedy_tokens(model, encoder, samples[0], 1)[0]
    model.generation_config.eos_token_id = [first]
    stopped = answer(model, encoder, samples[:1], max_new_tokens=12)[0]
    assert (stopped.new_tokens, stopped.hit_limit) == (1, False)


def test_the_checkpoints_sampling_settings_have_no_effect_and_cause_no_warning(
    model: Any, encoder: Encoder, samples: list[Sample], capfd: pytest.CaptureFixture[str]
) -> None:
    plain = answer(model, encoder, samples, max_new_tokens=12)
    capfd.readouterr()
    for flag, value in {"do_sample": True, "temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.5}.items():
        setattr(model.generation_config, flag, value)
    own = model.generation_config
    assert answer(model, encoder, samples, max_new_tokens=12) == plain
    assert "flags" not in "".join(capfd.readouterr())
    assert model.generation_config is own


def test_a_model_with_an_adapter_answers_and_stays_in_training_mode(
    model: Any, encoder: Encoder, samples: list[Sample]
) -> None:
    plain = answer(model, encoder, samples, max_new_tokens=8)
    adapted: Any = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "in_proj_qkv", "down_proj"], lora_dropout=0.5)
    )
    adapted.train()
    assert answer(adapted, encoder, samples, max_new_tokens=8) == plain
    assert adapted.training
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert texts(answer(adapted, encoder, samples, max_new_tokens=8)) != texts(plain)
