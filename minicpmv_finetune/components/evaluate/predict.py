"""The answer of a model to one question, for a first test of the model."""

from collections.abc import Sequence

from minicpmv_finetune import storage
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import check_records, image_addresses
from minicpmv_finetune.data.reading import Record
from minicpmv_finetune.data.samples import Reject, Sample, SampleError
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
        images: Addresses of the images, as in data. They come before the question in this order, each on its own line,
            unless the question contains their placeholders: `<image>` for one, `<image_00>`, `<image_01>` for several.
        prompt: Question.
        adapter_uri: Folder of a PEFT adapter, local or `s3://`; empty for none.
        max_new_tokens: Longest answer in tokens.
        thinking: Whether to request reasoning, which is returned in front of the answer as the data format writes it.

    Raises:
        UserError: A model, an adapter, an image or the prompt is unusable, or the model has no reasoning to request.
    """
    if not all(address.strip() for address in images):
        raise UserError("image: an address is empty; give a path or an s3:// URI.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} leaves no room for an answer; give at least 1.")
    sample = _make_sample(images, prompt)
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


def _make_sample(images: Sequence[str], prompt: str) -> Sample:
    """The question as a sample, by the rules of validate-data, which also check the images.

    Raises:
        UserError: An image or a placeholder is unusable.
    """
    names = [f"<image_{number:02}>" for number in range(len(images))]
    if len(images) > 1 and not any(name in prompt for name in names):
        prompt = "\n".join([*names, prompt])
    # The answer is not part of the prompt; a sample needs one.
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "?"}]
    image = images[0] if len(images) == 1 and names[0] not in prompt else dict(zip(names, images, strict=True))
    record = Record("prompt", 0, None, {"image": image, "conversations": turns})
    archives = {archive for address in image_addresses(record) if (archive := image_files.archive_of(address))}
    spans = {name: span for archive in archives for name, span in image_files.list_archive(archive).items()}
    (outcome,) = check_records([record], spans, exif_transpose=False)
    if isinstance(outcome, Reject):
        is_about_text = outcome.reason.startswith(("placeholder", "invalid"))
        raise UserError(f"prompt: {outcome.message}" if is_about_text else outcome.message)
    return Sample.model_validate_json(outcome.line)
