"""The answer of a model to one question, for a first test of the model."""

from collections.abc import Sequence

from minicpmv_finetune import storage
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.serving.asking import (
    NEW_TOKENS,
    LoadedModel,
    answer_sample,
    check_question,
    load_weights,
    question_sample,
)


def predict(
    model_uri: str,
    images: Sequence[str],
    prompt: str,
    adapter_uri: str = "",
    max_new_tokens: int = NEW_TOKENS,
    thinking: bool = False,
) -> str:
    """Answer a question about images; what is wrong with the question is said before the weights are loaded.

    Args:
        model_uri: Merged folder, or with an adapter its base model; a local path, an `s3://` URI or a hub id.
        images: Addresses of the images, as in data; see `minicpmv_finetune.serving.asking.answer`.
        prompt: Question.
        adapter_uri: Folder of a PEFT adapter, local or `s3://`; empty for none.
        max_new_tokens: Longest answer in tokens.
        thinking: Whether to request reasoning, which is returned in front of the answer as the data format writes it.

    Returns:
        The answer's text.

    Raises:
        UserError: A model, an adapter, an image or the prompt is unusable, or the model has no reasoning to request.
    """
    sample = question_sample(images, prompt)
    checkpoint = storage.fetch(model_uri)
    encoder = Encoder.from_checkpoint(checkpoint)
    check_question(encoder, sample, max_new_tokens, thinking)
    model = LoadedModel(load_weights(checkpoint, model_uri, adapter_uri), encoder)
    return answer_sample(model, sample, max_new_tokens, thinking)
