from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minicpmv_finetune.data.samples import ImageRef, Sample, Turn
from minicpmv_finetune.minicpmv.answer import answer, make_prompt
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.decoding import Prompt, _count_entering, decode_greedily

VERSIONS = ["2.6", "4.0", "4.5", "4.6", "4.7"]
QUESTIONS = ["Which digit is this?", "Which digit is this??", "Which digit is this????"]
LONG = "Which digit is this? Look well at each of its lines and count them."


@pytest.fixture(scope="module")
def images(digits: Path) -> list[ImageRef]:
    """Two digits and an image that is sliced."""
    large = digits / "large.png"
    Image.linear_gradient("L").resize((300, 200)).save(large)
    paths = [*sorted((digits / "images").glob("*.png"))[:2], large]
    sizes = [Image.open(path).size for path in paths]
    return [
        ImageRef(uri=str(path), sha256=sha256(path.read_bytes()).hexdigest(), width=width, height=height)
        for path, (width, height) in zip(paths, sizes, strict=True)
    ]


def ask(images: Sequence[ImageRef], questions: Sequence[str]) -> list[Sample]:
    """Each question about each image; the image comes after some text, so that a canvas does not begin at zero."""
    turns = [(Turn(role="user", parts=("Look here:", 0, question)),) for question in questions]
    return [
        Sample(id=f"{number} {place}", images=(image,), turns=turn, source="test")
        for number, image in enumerate(images)
        for place, turn in enumerate(turns)
    ]


def decode(
    model: Any, encoder: Encoder, samples: Sequence[Sample], stop: frozenset[int], max_new_tokens: int, batch_size: int
) -> dict[int, list[int]]:
    prompts = [make_prompt(sample, encoder, thinking=False) for sample in samples]
    return dict(decode_greedily(model, encoder, prompts, stop, max_new_tokens, batch_size))


def until_stop(tokens: list[int], stop: frozenset[int]) -> list[int]:
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))]


@pytest.mark.parametrize("version", VERSIONS)
def test_rests_of_other_lengths_change_no_token(
    version: str, tiny: Callable[[str], Path], images: list[ImageRef]
) -> None:
    model: Any = load_model(tiny(version), torch.float32)[0].eval()
    encoder = Encoder.from_checkpoint(tiny(version))
    text = Sample(id="text", images=(), turns=(Turn(role="user", parts=("Say something.",)),), source="test")
    samples = [*ask(images, [*QUESTIONS, LONG]), text]
    alone = decode(model, encoder, samples, frozenset(), 6, 1)
    assert alone.keys() == set(range(len(samples)))
    assert decode(model, encoder, samples, frozenset(), 6, 16) == alone
    # The stop tokens end answers at their first token and later, while the rests of other rows still run.
    stop = frozenset([alone[0][0], *(tokens[number % 6] for number, tokens in alone.items())])
    ended = {number: until_stop(tokens, stop) for number, tokens in alone.items()}
    assert 1 in {len(tokens) for tokens in ended.values()}
    for batch_size in (3, 7):  # the questions about an image do not fit; they fit
        assert decode(model, encoder, samples, stop, 6, batch_size) == ended
    assert decode(model, encoder, samples, frozenset(), 1, 7) == {number: alone[number][:1] for number in alone}


def test_rests_of_similar_length_run_in_one_call(tiny_46: Path, images: list[ImageRef]) -> None:
    model: Any = load_model(tiny_46, torch.float32)[0].eval()
    encoder = Encoder.from_checkpoint(tiny_46)
    calls: list[tuple[int, int]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, inputs: calls.append(tuple(inputs["inputs_embeds"].shape[:2])), with_kwargs=True
    )

    def runs(questions: Sequence[str], batch_size: int) -> list[int]:
        """Rows of each call of more than one token."""
        calls.clear()
        decode(model, encoder, ask(images[:1], questions), frozenset(), 6, batch_size)
        return [rows for rows, tokens in calls if tokens > 1]

    assert runs(QUESTIONS, 16) == [1, 3]
    assert runs([*QUESTIONS, LONG, f"{LONG}?"], 16) == [1, 3, 2]


def test_the_questions_about_an_image_enter_together(
    tiny_46: Path, images: list[ImageRef], count_slices: Callable[[Any], list[int]]
) -> None:
    model: Any = load_model(tiny_46, torch.float32)[0].eval()
    encoder = Encoder.from_checkpoint(tiny_46)
    samples = ask(images, QUESTIONS)
    slices = len(encoder.cut_images(samples[-1])) + 2
    encoded = count_slices(model)
    decode(model, encoder, samples, frozenset(), 3, 8)
    assert sum(encoded) == slices


@pytest.mark.parametrize("version", VERSIONS)
def test_no_logits_are_computed_of_tokens_after_which_none_is_generated(
    version: str, tiny: Callable[[str], Path], images: list[ImageRef]
) -> None:
    model: Any = load_model(tiny(version), torch.float32)[0].eval()
    encoder = Encoder.from_checkpoint(tiny(version))
    computed: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: computed.append(logits.numel() // logits.shape[-1])
    )
    answers = answer(model, encoder, ask(images, QUESTIONS), max_new_tokens=4)
    assert sum(computed) == sum(answered.new_tokens for answered in answers)


@pytest.mark.parametrize(
    ("images", "free", "count"),
    [
        ("", 4, 4),  # a quarter of 16 rows is free, and prompts without an image share none
        ("", 3, 0),
        ("aaaabbbb", 4, 4),
        ("aaabbbbb", 4, 3),  # all questions about b wait for each other
        ("aaaaabbb", 4, 0),  # more about an image than there are free rows
        ("aaaaaaaaab", 8, 8),  # and half of the rows is free
    ],
)
def test_how_many_prompts_enter(images: str, free: int, count: int) -> None:
    names: list[tuple[str, ...]] = [(name,) for name in images] or [()] * 9
    following = [Prompt([1], name, list) for name in names[: free + 1]]
    assert _count_entering(following, free, batch_size=16) == count
