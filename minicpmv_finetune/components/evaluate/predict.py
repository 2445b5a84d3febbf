"""The answer of a model to one question, for a first test of the model."""

import hashlib
import io
from collections.abc import Sequence

from PIL import Image

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import ImageRef, Sample, SampleError, Turn
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import load_with_adapter
from minicpmv_finetune.minicpmv.answer import answer, inference_device
from minicpmv_finetune.minicpmv.checkpoint import fingerprint, load_model
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.reports.training_record import RECORD_FILE, read_record


def predict(
    model_uri: str,
    images: Sequence[str],
    prompt: str,
    adapter_uri: str = "",
    max_new_tokens: int = 128,
    thinking: bool = False,
) -> str:
    """Answer a question about images.

    Args:
        model_uri: Merged folder, or with an adapter its base model; a local path, an `s3://` URI or a hub id.
        images: Local paths or `s3://` URIs of the images, which come before the question in this order.
        prompt: Question.
        adapter_uri: Folder of a PEFT adapter, local or `s3://`; empty for none.
        max_new_tokens: Longest answer in tokens.
        thinking: Whether to request reasoning, which is returned in front of the answer as the data format writes it.

    Raises:
        UserError: A model, an adapter, an image or the prompt is unusable, or the model has no reasoning to request.
    """
    if not prompt.strip():
        raise UserError("prompt: the prompt is empty; give a question.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} leaves no room for an answer; give at least 1.")
    image_refs = tuple(_read_image(uri) for uri in images)
    # The same order as in validate_data's samples: images first, each on its own line.
    image_parts: list[str | int] = [part for number in range(len(image_refs)) for part in (number, "\n")]
    turn = Turn(role="user", parts=(*image_parts, prompt))
    sample = Sample(id="prompt", images=image_refs, turns=(turn,), source="prompt")
    checkpoint = storage.fetch(model_uri)
    encoder = Encoder.from_checkpoint(checkpoint)
    if thinking and not encoder.generation.empty_thinking:
        raise UserError(f"thinking: MiniCPM-V {encoder.generation.version} has no think blocks; leave it out.")
    try:
        encoder.encode_prompt(sample)
    except SampleError as error:
        raise UserError(f"prompt: {error}") from error
    device = inference_device()
    if adapter_uri:
        adapter = storage.fetch(adapter_uri)
        if (adapter / RECORD_FILE).is_file():
            read_record(adapter).require_base(adapter, model_uri, fingerprint(checkpoint))
        model = load_with_adapter(checkpoint, adapter, device_map=device)
    else:
        model, _ = load_model(checkpoint, device_map=device)
    answered = answer(model, encoder, [sample], max_new_tokens, thinking=thinking)[0]
    return f"<think>\n{answered.reasoning}\n</think>\n\n{answered.text}" if answered.reasoning else answered.text


def _read_image(uri: str) -> ImageRef:
    content = storage.read_bytes(uri)
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{uri}: not a readable image ({type(error).__name__}); give a PNG, a JPEG or another format that Pillow "
            "reads."
        ) from error
    return ImageRef(uri=uri, sha256=hashlib.sha256(content).hexdigest(), width=width, height=height)
