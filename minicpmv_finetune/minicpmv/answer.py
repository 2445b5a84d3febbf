"""Free generation: what a model answers to samples' questions, greedily and in batches.

Evaluation, prediction and the merge's gate all ask through this one function, so a figure in a report is what a user
would see. Batches hold prompts of like length, longest first: little padding, and a batch that does not fit the
device's memory is met at the start and not after an hour.
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
    """What a model said.

    Attributes:
        text: without special tokens and outer white space.
        new_tokens: number of generated tokens, the one that ends the turn included.
        hit_limit: whether `max_new_tokens` ended it, so that the text may be cut off.
    """

    text: str
    new_tokens: int
    hit_limit: bool


def answer(
    model: PreTrainedModel,
    encoder: Encoder,
    samples: Sequence[Sample],
    max_new_tokens: int = 128,
    batch_size: int = 16,
    on_done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Ask a model each sample's last question.

    Args:
        model: with or without a PEFT adapter on top; left in the mode (training or not) in which it came.
        encoder: of the model's checkpoint; its slicing decides how images are seen.
        samples: a last assistant turn, if there is one, is the expected answer and not shown.
        max_new_tokens: of one answer.
        batch_size: samples asked at once; the answers do not depend on it.
        on_done: told the number of answers after each batch, for a progress bar.

    Returns:
        The answers in the order of the samples.

    Raises:
        SampleError: a text contains a special token.
        UserError: an image changed since it was validated.
    """
    prompts = [encoder.encode_prompt(sample) for sample in samples]
    # Stable, so that the batches, and with them the last bits of every sum, are the same in every run.
    longest_first = sorted(range(len(samples)), key=lambda number: -len(prompts[number]))
    config = _greedy(model, encoder, max_new_tokens)
    answers: dict[int, Answer] = {}
    with _answering(model, config):
        for start in range(0, len(samples), batch_size):
            numbers = longest_first[start : start + batch_size]
            rows = [ModelInput(samples[n].id, prompts[n], [], _slices(samples[n], encoder)) for n in numbers]
            for number, generated in zip(numbers, _generate(model, encoder, rows), strict=True):
                answers[number] = _read(generated, encoder, config)
            if on_done is not None:
                on_done(len(numbers))
    return [answers[number] for number in range(len(samples))]


def inference_device() -> torch.device:
    """Where a model that answers belongs: the first GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _greedy(model: PreTrainedModel, encoder: Encoder, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that stops where the checkpoint's own serving would, and at the generation's end of turn."""
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
def _answering(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put the model into inference with these generation settings alone, and back as it was.

    `generate` fills what a given configuration leaves unset from the checkpoint's generation_config.json: its
    penalties would make the answer another than the likeliest one, its sampling flags be warned about. So the
    checkpoint's settings stand aside meanwhile.
    """
    # An adapter's wrapper reads the settings of the model it wraps.
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


def _slices(sample: Sample, encoder: Encoder) -> list[NDArray[np.uint8]]:
    """The slices of a sample's images, in the order in which the turns show them."""
    plans = encoder.plan(sample)
    order = [part for turn in sample.turns for part in turn.parts if isinstance(part, int)]
    return [
        pixels
        for number in order
        for pixels in cut_slices(open_image(sample.images[number]), plans[number], encoder.slicing)
    ]


def _generate(model: PreTrainedModel, encoder: Encoder, rows: Sequence[ModelInput]) -> list[list[int]]:
    """The new tokens of each row, the padding after a finished answer included."""
    batch = collate(rows, encoder.pad_token_id, encoder.slicing.patch_size, "left", encoder.slicing.resampler)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    generated = model.generate(**batch)  # type: ignore[operator]  # comes with GenerationMixin
    new: list[list[int]] = generated[:, batch["input_ids"].shape[1] :].tolist()
    return new


def _read(generated: Sequence[int], encoder: Encoder, config: GenerationConfig) -> Answer:
    """Cut the padding behind the first stop token and turn ids into words."""
    end = next((place for place, token in enumerate(generated) if token in config.eos_token_id), None)
    kept = list(generated if end is None else generated[: end + 1])
    text = str(encoder.tokenizer.decode(kept, skip_special_tokens=True)).strip()
    return Answer(text=text, new_tokens=len(kept), hit_limit=end is None)
