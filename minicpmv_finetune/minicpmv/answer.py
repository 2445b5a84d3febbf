"""Free generation: the answers of a model to the questions of samples, greedily and in batches.

Evaluation, prediction and the parity check of the merge step all use this one function, so a figure in a report is
what a user would see. A batch contains prompts of similar length, and the longest prompts come first: there is little
padding, and a batch that exceeds the device's memory fails at the start and not after an hour.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel

from minicpmv_finetune.data.samples import Sample, open_image

from .batch import collate
from .conversation import Encoder
from .model_input import ModelInput
from .slicing import cut_slices


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
        batch_size: Number of samples in a batch. The answers do not depend on it.
        on_done: Function called after each batch with the number of its samples, for a progress bar.
        thinking: Whether to request reasoning, in generations that have it; None where the expected answer has some.

    Returns:
        The answers in the order of the samples.

    Raises:
        SampleError: A text contains a token of the format itself.
        UserError: An image changed since it was validated.
    """
    thinks = [encoder.asks_for_reasoning(sample) if thinking is None else thinking for sample in samples]
    prompts = [encoder.encode_prompt(sample, think) for sample, think in zip(samples, thinks, strict=True)]
    # The sort is stable, so that the batches, and with them the rounding of every sum, are the same in every run.
    longest_first = sorted(range(len(samples)), key=lambda number: -len(prompts[number]))
    config = _greedy_config(model, encoder, max_new_tokens)
    answers: dict[int, Answer] = {}
    with _inference_mode(model, config):
        for start in range(0, len(samples), batch_size):
            numbers = longest_first[start : start + batch_size]
            inputs = [ModelInput(samples[n].id, prompts[n], [], _cut_images(samples[n], encoder)) for n in numbers]
            for number, generated in zip(numbers, _generate(model, encoder, inputs), strict=True):
                answers[number] = _decode_answer(generated, encoder, config, thinks[number])
            if on_done is not None:
                on_done(len(numbers))
    return [answers[number] for number in range(len(samples))]


def inference_device() -> torch.device:
    """Return the device for a model that generates: the first GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _greedy_config(model: PreTrainedModel, encoder: Encoder, max_new_tokens: int) -> GenerationConfig:
    """Settings of greedy decoding that stops at the checkpoint's own stop tokens and at the end of the turn."""
    stop = {encoder.tokenizer.convert_tokens_to_ids(encoder.generation.end_of_turn)}
    published = model.generation_config.eos_token_id if model.generation_config is not None else None
    if published is not None:
        stop |= set(published) if isinstance(published, list) else {published}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stop),
        pad_token_id=encoder.pad_token_id,
    )


@contextmanager
def _inference_mode(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Switch the model to evaluation with these generation settings alone, and restore its state at the end.

    `generate` fills the unset fields of a given configuration from the checkpoint's generation_config.json: the
    checkpoint's penalties would change the answer, and its sampling flags would cause warnings. Therefore the
    checkpoint's settings are replaced while the model generates.
    """
    # An adapter's wrapper reads the settings of the model that it wraps.
    wrapped = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    was_training, own_config = model.training, wrapped.generation_config
    model.eval()
    wrapped.generation_config = config
    try:
        with torch.inference_mode():
            yield
    finally:
        wrapped.generation_config = own_config
        model.train(was_training)


def _cut_images(sample: Sample, encoder: Encoder) -> list[NDArray[np.uint8]]:
    """Return the slices of a sample's images, in the order in which the images appear in the turns."""
    plans = encoder.plan(sample)
    order = [part for turn in sample.turns for part in turn.parts if isinstance(part, int)]
    return [
        pixels
        for number in order
        for pixels in cut_slices(open_image(sample.images[number]), plans[number], encoder.slicing)
    ]


def _generate(model: PreTrainedModel, encoder: Encoder, inputs: Sequence[ModelInput]) -> list[list[int]]:
    """Return the new tokens of each prompt, including the padding after a finished answer."""
    batch = collate(inputs, encoder.pad_token_id, encoder.slicing.patch_size, "left", encoder.slicing.resampler)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    generated = model.generate(**batch)  # type: ignore[operator]  # comes with GenerationMixin
    new: list[list[int]] = generated[:, batch["input_ids"].shape[1] :].tolist()
    return new


def _decode_answer(generated: Sequence[int], encoder: Encoder, config: GenerationConfig, thinking: bool) -> Answer:
    """Decode the tokens before the first stop token; what follows it is padding.

    Args:
        generated: New tokens of one prompt.
        encoder: Encoder of the model's checkpoint.
        config: Settings with the stop tokens.
        thinking: Whether the prompt requested reasoning.
    """
    end = next((place for place, token in enumerate(generated) if token in config.eos_token_id), None)
    new_tokens = len(generated) if end is None else end + 1
    reasoning, text = encoder.split_reasoning(encoder.decode(generated[:end]), is_open=thinking)
    return Answer(text, new_tokens, hit_limit=end is None, reasoning=reasoning)
