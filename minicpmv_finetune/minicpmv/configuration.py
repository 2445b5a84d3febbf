"""The configuration of MiniCPM-V 2.6, 4.0 and 4.5, read from and written to `config.json` in the published layout.

The published file is flat: it contains the language model's fields and the fields about images at the same level, and
`version` decides which language model it describes. Here the fields are sorted into the configurations of transformers'
own classes, from which the model is built. Saving writes the published fields under their published names, so that the
checkpoint's own code can read what this project wrote.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, SiglipVisionConfig

# Configuration class of the language model for each published `version`; docs/generations.md names the sources.
_LANGUAGE_MODELS: dict[str, type[PreTrainedConfig]] = {"2.6": Qwen2Config, "4.0": LlamaConfig, "4.5": Qwen3Config}

RESAMPLER_HEAD_DIM = 128
"""Width of each head of the resampler's attention in every generation: heads = hidden_size // 128."""

IMAGE_TOKEN = "<unk>"
"""The placeholder token of image features: each slice has `query_num` of these tokens."""

_FIELDS_OF_TRANSFORMERS = {"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


class MiniCPMVConfig(PreTrainedConfig):
    """Configuration of `MiniCPMVForConditionalGeneration`.

    Further arguments are the flat fields of a published file, which are kept and written back.

    Attributes:
        version: Published version, 2.6, 4.0 or 4.5, which decides the language model.
        query_num: Number of features, and so of tokens, that the resampler computes from a slice.
        drop_vision_last_layer: Whether the last layer of the vision tower is removed.
        image_token_id: Id of the placeholder token, one for each of a slice's `query_num` features. Published files do
            not contain it, because it is the tokenizer's `<unk>`; if it is None, the model reads it from the tokenizer
            files in the folder of its weights.
        use_cache: Whether generation caches keys and values.
        text_config: Configuration of the language model; if None, it is built from the flat fields of a published file.
        vision_config: Configuration of the vision tower.

    Raises:
        ValueError: The version is unknown, or fields contradict each other.
    """

    model_type = "minicpmv"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    sub_configs_defaults = {"text_config": PreTrainedConfig, "vision_config": SiglipVisionConfig}  # type: ignore[dict-item]  # noqa: RUF012

    version: float | str | int | None = None
    query_num: int = 64
    drop_vision_last_layer: bool = False
    image_token_id: int | None = None
    use_cache: bool | None = True
    text_config: Any = None
    vision_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._published = {
            name: copy.deepcopy(value)
            for name, value in kwargs.items()
            if name not in {"name_or_path", "attn_implementation", "experts_implementation"}
        }
        base_fields = {
            name: kwargs[name]
            for name in ("name_or_path", "attn_implementation", "torch_dtype", "output_attentions")
            if name in kwargs
        }
        if isinstance(self.vision_config, dict):
            self._published["vision_config"] = copy.deepcopy(self.vision_config)
            # The published model_type "siglip" is, in transformers, a model with vision and text.
            self.vision_config = SiglipVisionConfig(
                **{name: value for name, value in self.vision_config.items() if name != "model_type"}
            )
        elif self.vision_config is None:
            self.vision_config = SiglipVisionConfig(patch_size=14, image_size=980)
        if self.text_config is None:
            language_model = self._language_model_class()
            # Published files have `rope_theta` and `rope_scaling`; transformers 5 converts them to `rope_parameters`.
            names = {field.name for field in dataclasses.fields(language_model)} | {"rope_theta", "rope_scaling"}
            fields = {name: copy.deepcopy(value) for name, value in self._published.items() if name in names}
            self.text_config = language_model(**fields)
        elif isinstance(self.text_config, dict):
            self.text_config = self._language_model_class()(**self.text_config)
        self._original_text_config = self.text_config.to_dict()
        super().__post_init__(**base_fields)
        self._check()

    def _language_model_class(self) -> type[PreTrainedConfig]:
        for version, language_model in _LANGUAGE_MODELS.items():
            if self.version is not None and str(float(self.version)) == version:
                return language_model
        raise ValueError(f"version {self.version!r} is none of {', '.join(_LANGUAGE_MODELS)}")

    def _check(self) -> None:
        hidden_size, patch_size = self.text_config.hidden_size, self._published.get("patch_size")
        if hidden_size % RESAMPLER_HEAD_DIM:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of {RESAMPLER_HEAD_DIM}, the resampler's head width"
            )
        if patch_size is not None and patch_size != self.vision_config.patch_size:
            raise ValueError(
                f"patch_size {patch_size} contradicts vision_config.patch_size {self.vision_config.patch_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the published fields, with the values that changed since, such as the number of layers or tokens."""
        text = self.text_config.to_dict()
        changed = {
            name: value
            for name, value in text.items()
            if value != self._original_text_config.get(name) and name not in _FIELDS_OF_TRANSFORMERS
        }
        fields = {
            **copy.deepcopy(self._published),
            **changed,
            # The checkpoint's own code and inference servers read these names, whichever class here saved them.
            "architectures": ["MiniCPMV"],
            "model_type": self.model_type,
            "transformers_version": transformers.__version__,
            "version": self.version,
            "query_num": self.query_num,
            "drop_vision_last_layer": self.drop_vision_last_layer,
            "use_cache": self.use_cache,
        }
        if "vision_config" not in self._published:
            fields["vision_config"] = self.vision_config.to_dict()
        if self.image_token_id is not None:
            fields["image_token_id"] = self.image_token_id
        if self.dtype is not None:
            # The published code reads the type under this name.
            fields["torch_dtype"] = str(self.dtype).removeprefix("torch.") if self.dtype else None
        quantization = getattr(self, "quantization_config", None)
        if quantization is not None:
            fields["quantization_config"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`, because published fields are written back even if they equal a default."""
        return self.to_dict()


def find_token_id(checkpoint: Path, token: str) -> int | None:
    """Read the id of a token from a checkpoint's tokenizer files; None if the files do not contain it."""
    path = checkpoint / "tokenizer.json"
    if path.is_file():
        document = json.loads(path.read_text())
        for added in document.get("added_tokens", []):
            if added["content"] == token:
                return int(added["id"])
        vocabulary = document.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, dict) and token in vocabulary:
            return int(vocabulary[token])
    path = checkpoint / "tokenizer_config.json"
    if path.is_file():
        for number, added in json.loads(path.read_text()).get("added_tokens_decoder", {}).items():
            if added["content"] == token:
                return int(number)
    return None


AutoConfig.register(MiniCPMVConfig.model_type, MiniCPMVConfig)
