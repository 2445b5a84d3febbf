"""What transformers' serving application asks of a processor, answered by the code of training and evaluation.

So a server sends the tokens and the pixels that the model was trained on, in every generation: transformers has no
processor for 2.6, 4.0 and 4.5, whose checkpoints bring Python files of their own that this project never runs.
"""

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from transformers import BatchFeature, GenerationConfig

from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.checking import inspect_image
from minicpmv_finetune.data.samples import ImageRef, Sample, SampleError, Turn
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.answer import stop_tokens
from minicpmv_finetune.minicpmv.batch import collate
from minicpmv_finetune.minicpmv.conversation import Encoder
from minicpmv_finetune.minicpmv.model_input import ModelInput

from .asking import LoadedModel, check_question

_ROLES = ("system", "user", "assistant")
# Of the application, without meaning for a model of texts and images.
_IGNORED_OPTIONS = {"add_generation_prompt", "return_tensors", "return_dict", "tokenize", "load_audio_from_video"}

Message = Mapping[str, Any]
"""One message: `role`, and `content` as a list of `{"type": "text", "text": …}` and `{"type": "image", "url": …}`."""


class ServedProcessor:
    """The processor of one checkpoint.

    Attributes:
        encoder: Encoder of the checkpoint.
        tokenizer: What the application decodes with while it streams.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.tokenizer = SimpleNamespace(_tokenizer=_streaming_tokenizer(encoder))

    def apply_chat_template(
        self, messages: Sequence[Message], tools: Any = None, enable_thinking: bool = False, **options: Any
    ) -> BatchFeature:
        """The tensors of a conversation whose last message is the question.

        Args:
            messages: The conversation.
            tools: Not supported.
            enable_thinking: Whether to request reasoning.
            **options: Further options of the chat template, of which none is supported.

        Raises:
            UserError: The conversation or an option is unusable.
        """
        unknown = sorted(set(options) - _IGNORED_OPTIONS)
        if tools:
            unknown.append("tools")
        if unknown:
            raise UserError(f"{', '.join(unknown)}: not supported by this model; leave it out.")
        sample = conversation_sample(messages)
        check_question(self.encoder, sample, thinking=enable_thinking)
        prompt = self.encoder.encode_prompt(sample, enable_thinking)
        slicing = self.encoder.slicing
        inputs = ModelInput(sample.id, prompt, [], self.encoder.cut_images(sample))
        return BatchFeature(collate([inputs], self.encoder.pad_token_id, slicing.patch_size, "left", slicing.resampler))

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of an answer, as the evaluation reads it: words such as `<box>` stay.

        Args:
            ids: Generated tokens, a list or a tensor [T].
            skip_special_tokens: Not used; the tokens from the first that ends the answer on are left out.
        """
        generated = list(map(int, ids))
        stops = set(self.encoder.stop_token_ids)
        end = next((place for place, token in enumerate(generated) if token in stops), None)
        return self.encoder.decode(generated[:end])


def greedy_config(model: LoadedModel, max_new_tokens: int) -> GenerationConfig:
    """Settings with which transformers decodes as the evaluation does: greedily, until a stop token.

    Args:
        model: The loaded model.
        max_new_tokens: Longest answer in tokens.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stop_tokens(model.model, model.encoder)),
        pad_token_id=model.encoder.pad_token_id,
    )


def conversation_sample(messages: Sequence[Message]) -> Sample:
    """A conversation as a sample.

    Raises:
        UserError: A message or an image is unusable.
    """
    if not messages or messages[-1].get("role") != "user":
        raise UserError("messages: the last one must be the user's, a question.")
    images: list[ImageRef] = []
    turns = []
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in _ROLES:
            raise UserError(f"messages: the role {role!r} of message {number} is none of {', '.join(_ROLES)}.")
        turns.append(Turn(role=role, parts=_read_parts(message["content"], number, images)))
    return Sample(id="request", images=tuple(images), turns=tuple(turns), source="request")


def _read_parts(
    content: str | Sequence[Mapping[str, Any]], message: int, images: list[ImageRef]
) -> tuple[str | int, ...]:
    """The parts of a message, each on its own line as in the published data; its images are appended to `images`."""
    parts: list[str | int] = []

    def write(text: str) -> None:
        if parts and isinstance(parts[-1], str):
            parts[-1] += text
        else:
            parts.append(text)

    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if parts:
            write("\n")
        if item["type"] == "text":
            write(str(item["text"]))
        elif item["type"] == "image":
            parts.append(len(images))
            images.append(_read_image(str(item["url"])))
        else:
            raise UserError(f"messages: message {message} has a {item['type']}; send texts and images only.")
    return tuple(parts)


def _read_image(address: str) -> ImageRef:
    """Check an image of a request.

    Raises:
        UserError: The image is unusable, or not in the request itself: the server would read files of its machine, or
            open addresses that the sender cannot reach.
    """
    if not image_files.is_data_uri(address):
        raise UserError(
            f"image_url: {image_files.shortened(address)} is an address; send the image itself, as "
            "data:image/png;base64,…"
        )
    try:
        return inspect_image(address).ref
    except SampleError as error:
        raise UserError(f"image_url: {error}") from error


def _streaming_tokenizer(encoder: Encoder) -> Tokenizer:
    """The tokenizer in which only the format's own tokens are special, since a stream leaves special tokens out."""
    fast_tokenizer: Any = encoder.tokenizer
    content = json.loads(fast_tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in encoder.structural_tokens
    return Tokenizer.from_str(json.dumps(content))
