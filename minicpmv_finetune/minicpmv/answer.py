"""Free generation: the answers of a model to the questions of samples, as a user would get them.

Evaluation, prediction and the parity check of the merge step all use this one function, so a figure in a report is
what a user would see. Prompts of similar length are answered together, and the longest come first: there is little
padding, and a batch that exceeds the device's memory fails at the start and not after an hour.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from minicpmv_finetune.data.samples import Sample

from .conversation import Encoder
from .decoding import Prompt, decode_greedily


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one sample.

    Attributes:
        text: Generated text without the token that ends it, without reasoning and without white space at its ends.
        new_tokens: Number of generated tokens, including the one that ends the turn.
        hit_limit: Whether generation ended because of `max_new_tokens`, so that the text may be cut off.
        reasoning: Text of the think block in front of the answer; empty in generations without such blocks.
    """

    text: str
    new_tokens: int
    hit_limit: bool
    reasoning: str = ""


def answer(
    model: PreTrainedModel,
    encoder: Encoder,
    samples: Sequence[Sample],
    max_new_tokens: int = 128,
    batch_size: int = 16,
    on_done: Callable[[int], None] | None = None,
    thinking: bool | None = None,
) -> list[Answer]:
    """Generate the answer to each sample's last question.

    Args:
        model: Model with or without a PEFT adapter. Its mode (training or evaluation) is restored at the end.
        encoder: Encoder of the model's checkpoint. Its slicing configuration decides how images are sliced.
        samples: Samples to answer. If the last turn is the assistant's, it is the expected answer and is not part of
            the prompt.
        max_new_tokens: Largest number of tokens of one answer.
        batch_size: Largest number of samples that are answered at the same time. The answers do not depend on it.
        on_done: Function called with the number of samples whose answers have ended, for a progress bar.
        thinking: Whether to request reasoning, in generations that have it; None where the expected answer has some.

    Returns:
        The answers in the order of the samples.

    Raises:
        SampleError: A text contains a token of the format itself.
        UserError: An image changed since it was validated.
    """
    thinks = [encoder.asks_for_reasoning(sample) if thinking is None else thinking for sample in samples]
    prompts = [make_prompt(sample, encoder, think) for sample, think in zip(samples, thinks, strict=True)]
    stop = stop_tokens(model, encoder)
    answers: dict[int, Answer] = {}
    with _inference_mode(model) as unwrapped:
        numbers = _order(prompts)
        ordered = [prompts[number] for number in numbers]
        for place, tokens in decode_greedily(unwrapped, encoder, ordered, stop, max_new_tokens, batch_size):
            answers[numbers[place]] = _decode_answer(tokens, encoder, stop, thinks[numbers[place]])
            if on_done is not None:
                on_done(1)
    return [answers[number] for number in range(len(samples))]


def inference_device() -> torch.device:
    """Return the device for a model that generates: the first GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_prompt(sample: Sample, encoder: Encoder, thinking: bool) -> Prompt:
    """The prompt of a sample's last question; its images are read and cut when it is answered."""
    images = [sample.images[number] for number in sample.image_order]
    names = tuple(f"{image.sha256} {image.rotated}" for image in images)
    return Prompt(encoder.encode_prompt(sample, thinking), names, lambda: encoder.cut_images(sample))


def _order(prompts: Sequence[Prompt]) -> list[int]:
    """The order in which prompts are answered: longest first, those with the same images one after the other."""
    longest: dict[tuple[str, ...], int] = defaultdict(int)
    for prompt in prompts:
        longest[prompt.images] = max(longest[prompt.images], len(prompt.ids))
    # The sort is stable, so that the batches, and with them the rounding of every sum, are the same in every run.
    return sorted(
        range(len(prompts)),
        key=lambda number: (-longest[prompts[number].images], prompts[number].images, -len(prompts[number].ids)),
    )


def stop_tokens(model: PreTrainedModel, encoder: Encoder) -> frozenset[int]:
    """The checkpoint's own stop tokens and the end of the turn."""
    published = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = published if isinstance(published, list) else [] if published is None else [published]
    return frozenset([encoder.tokenizer.convert_tokens_to_ids(encoder.generation.end_of_turn), *own])


@contextmanager
def _inference_mode(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Switch the model to evaluation, and restore its mode at the end; yields it without an adapter's wrapper."""
    was_training = model.training
    model.eval()
    try:
        yield next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    finally:
        model.train(was_training)


def _decode_answer(generated: Sequence[int], encoder: Encoder, stop: frozenset[int], thinking: bool) -> Answer:
    """Decode an answer without the stop token that ends it.

    Args:
        generated: New tokens of one prompt, at least one.
        encoder: Encoder of the model's checkpoint.
        stop: Tokens that end an answer.
        thinking: Whether the prompt requested reasoning.
    """
    has_ended = generated[-1] in stop
    written = generated[:-1] if has_ended else generated
    reasoning, text = encoder.split_reasoning(encoder.decode(written), is_open=thinking)
    return Answer(text, len(generated), hit_limit=not has_ended, reasoning=reasoning)
