"""One question, one answer: the first thing to try with a model."""

import hashlib
import io
from collections.abc import Sequence

from PIL import Image

from minicpmv_finetune import storage
from minicpmv_finetune.data.samples import ImageRef, Sample, SampleError, Turn
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.answer import answer, inference_device
from minicpmv_finetune.minicpmv.checkpoint import load_model, load_with_adapter
from minicpmv_finetune.minicpmv.conversation import Encoder


def predict(
    model_uri: str, images: Sequence[str], prompt: str, adapter_uri: str = "", max_new_tokens: int = 128
) -> str:
    """Answer a question about images.

    Args:
        model_uri: a merged folder, or with an adapter its base model; local, `s3://` or a hub id.
        images: local paths or `s3://` URIs, shown before the words in this order.
        prompt: the question.
        adapter_uri: a PEFT adapter folder, local or `s3://`; empty for none.
        max_new_tokens: longest answer in tokens.

    Raises:
        UserError: a model, an adapter, an image or the prompt is unusable.
    """
    if not prompt.strip():
        raise UserError("prompt: says nothing; ask something.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} leaves no room for an answer; give at least 1.")
    image_refs = tuple(_image(uri) for uri in images)
    # As validate_data lays out a sample: images first, each on a line of its own.
    shown: list[str | int] = [part for number in range(len(image_refs)) for part in (number, "\n")]
    turn = Turn(role="user", parts=(*shown, prompt))
    sample = Sample(id="prompt", images=image_refs, turns=(turn,), source="prompt")
    checkpoint = storage.fetch(model_uri)
    encoder = Encoder.from_checkpoint(checkpoint)
    try:
        encoder.encode_prompt(sample)
    except SampleError as error:
        raise UserError(f"prompt: {error}") from error
    device = inference_device()
    if adapter_uri:
        model = load_with_adapter(checkpoint, storage.fetch(adapter_uri), device_map=device)
    else:
        model, _ = load_model(checkpoint, device_map=device)
    return answer(model, encoder, [sample], max_new_tokens)[0].text


def _image(uri: str) -> ImageRef:
    content = storage.read_bytes(uri)
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{uri}: not a readable image ({type(error).__name__}); give a PNG, JPEG or another format Pillow reads."
        ) from error
    return ImageRef(uri=uri, sha256=hashlib.sha256(content).hexdigest(), width=width, height=height)
