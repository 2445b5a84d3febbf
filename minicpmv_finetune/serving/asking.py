"""Load a model once and ask it questions, as the evaluation asks it.

The command `predict`, the page of `chat` and programs use these functions:

    from minicpmv_finetune import answer, load

    model = load("build/mine/model")
    print(answer(model, "What is the total?", "photo.jpg"))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from minicpmv_finetune import storage
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import check_records, image_addresses
from minicpmv_finetune.data.reading import Record
from minicpmv_finetune.data.samples import Reject, Sample, SampleError, open_image
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import load_with_adapter
from minicpmv_finetune.minicpmv.answer import answer as answer_samples
from minicpmv_finetune.minicpmv.answer import inference_device
from minicpmv_finetune.minicpmv.checkpoint import fingerprint, load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.slicing import cut_slices
from minicpmv_finetune.reports.training_record import RECORD_FILE, read_record

NEW_TOKENS = 128
"""Longest answer in tokens, unless another length is asked for."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory; `load` makes it and `answer` asks it.

    Attributes:
        model: The model, with its adapter if it has one.
        encoder: Encoder of the model's checkpoint.
    """

    model: PreTrainedModel
    encoder: Encoder


@dataclass(frozen=True)
class ShownSlice:
    """A part of an image as the model sees it.

    Attributes:
        pixels: uint8 [height, width, 3].
        caption: Which part it is.
    """

    pixels: NDArray[np.uint8]
    caption: str


def load(model_uri: str | Path, adapter_uri: str | Path = "") -> LoadedModel:
    """Load a model, on the first GPU if there is one.

    Args:
        model_uri: Merged folder, or with an adapter its base model; a local path, an `s3://` URI or a hub id.
        adapter_uri: Folder of a PEFT adapter, local or `s3://`; empty for none.

    Returns:
        The model in memory, which `answer` takes.

    Raises:
        UserError: The model or the adapter is unusable, or they do not belong together.
    """
    checkpoint = storage.fetch(str(model_uri))
    encoder = Encoder.from_checkpoint(checkpoint)
    return LoadedModel(load_weights(checkpoint, str(model_uri), str(adapter_uri)), encoder)


def load_weights(checkpoint: Path, model_uri: str, adapter_uri: str) -> PreTrainedModel:
    """Load the weights of a checkpoint, and put an adapter on them if there is one.

    Args:
        checkpoint: Local folder of the checkpoint.
        model_uri: Where it came from, for the error message.
        adapter_uri: Folder of a PEFT adapter, local or `s3://`; empty for none.

    Raises:
        UserError: The weights or the adapter are unusable, or they do not belong together.
    """
    device = inference_device()
    if not adapter_uri:
        return load_model(checkpoint, device_map=device)[0]
    adapter = storage.fetch(adapter_uri)
    if (adapter / RECORD_FILE).is_file():
        read_record(adapter).require_base(adapter, model_uri, fingerprint(checkpoint))
    return load_with_adapter(checkpoint, adapter, device_map=device)


def answer(
    model: LoadedModel,
    question: str,
    *images: str | Path,
    earlier: Sequence[tuple[str, str]] = (),
    max_new_tokens: int = NEW_TOKENS,
    thinking: bool = False,
) -> str:
    """Answer a question about images, greedily.

    Args:
        model: The loaded model.
        question: Question.
        *images: Addresses of the images, as in data. They come before the question in this order, each on its own line,
            unless the question contains their placeholders: `<image>` for one, `<image_00>`, `<image_01>` for several.
        earlier: Questions and answers before this question. The images then come before the first of these questions,
            or where one of them has their placeholders.
        max_new_tokens: Longest answer in tokens.
        thinking: Whether to request reasoning, which is returned in front of the answer as the data format writes it.

    Returns:
        The answer's text.

    Raises:
        UserError: An image or the question is unusable, or the model has no reasoning to request.
    """
    sample = question_sample([str(image) for image in images], question, earlier)
    return answer_sample(model, sample, max_new_tokens, thinking)


def answer_sample(model: LoadedModel, sample: Sample, max_new_tokens: int = NEW_TOKENS, thinking: bool = False) -> str:
    """Answer the last question of a sample; see `answer`.

    Raises:
        UserError: The question is unusable, or the model has no reasoning to request.
    """
    check_question(model.encoder, sample, max_new_tokens, thinking)
    answered = answer_samples(model.model, model.encoder, [sample], max_new_tokens, thinking=thinking)[0]
    return f"<think>\n{answered.reasoning}\n</think>\n\n{answered.text}" if answered.reasoning else answered.text


def check_question(encoder: Encoder, sample: Sample, max_new_tokens: int = NEW_TOKENS, thinking: bool = False) -> None:
    """Check that a model can be asked a question, which needs no weights.

    Raises:
        UserError: It cannot.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} leaves no room for an answer; give at least 1.")
    if thinking and not encoder.generation.empty_thinking:
        raise UserError(f"thinking: MiniCPM-V {encoder.generation.version} has no think blocks; leave it out.")
    try:
        encoder.encode_prompt(sample)
    except SampleError as error:
        raise UserError(f"prompt: {error}") from error


def question_sample(images: Sequence[str], question: str, earlier: Sequence[tuple[str, str]] = ()) -> Sample:
    """A question as a sample, by the rules of validate-data, which also check the images.

    Args:
        images: Addresses of the images, as in data.
        question: Question, with or without placeholders of the images; see `answer`.
        earlier: Questions and answers before this question; see `answer`.

    Raises:
        UserError: An image, a placeholder or an earlier answer is unusable.
    """
    if not all(address.strip() for address in images):
        raise UserError("image: an address is empty; give a path or an s3:// URI.")
    names = [f"<image_{number:02}>" for number in range(len(images))]
    questions = [*(asked for asked, _ in earlier), question]
    has_names = any(name in asked for asked in questions for name in names)
    if len(images) > 1 and not has_names:
        questions[0] = "\n".join([*names, questions[0]])
    # The answer to the question is not part of the prompt; a sample needs one.
    answers = [*(answered for _, answered in earlier), "?"]
    turns = [
        {"role": role, "content": text}
        for pair in zip(questions, answers, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    image = images[0] if len(images) == 1 and not has_names else dict(zip(names, images, strict=True))
    record = Record("prompt", 0, None, {"image": image, "conversations": turns})
    archives = {address: image_files.archive_of(address) for address in image_addresses(record)}
    members = {archive: image_files.list_archive(archive) for archive in set(archives.values()) if archive}
    spans = {
        address: span for address, archive in archives.items() if archive and (span := members[archive].get(address))
    }
    (outcome,) = check_records([record], spans, exif_transpose=False)
    if isinstance(outcome, Reject):
        is_about_text = outcome.reason.startswith(("placeholder", "invalid"))
        raise UserError(f"prompt: {outcome.message}" if is_about_text else outcome.message)
    return Sample.model_validate_json(outcome.line)


def shown_slices(encoder: Encoder, sample: Sample) -> list[ShownSlice]:
    """What a model sees of a sample's images: of each the overview and then its slices, row by row."""
    shown = []
    several = len(sample.images) > 1
    for number, (image, plan) in enumerate(zip(sample.images, encoder.plan(sample), strict=True), 1):
        columns = plan.grid[1] if plan.grid else 1
        for place, pixels in enumerate(cut_slices(open_image(image), plan, encoder.slicing)):
            row, column = divmod(place - 1, columns)
            part = "overview" if place == 0 else f"row {row + 1}, column {column + 1}"
            shown.append(ShownSlice(pixels, f"image {number}: {part}" if several else part))
    return shown
