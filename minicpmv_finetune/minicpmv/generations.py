"""One description for each model generation, with everything that differs between generations, in one place.

The steps read this description and contain no `if version == …`. The generation is detected from a checkpoint's JSON
files alone, so a wrong base model is refused in a tenth of a second, before torch is imported or weights are read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.data.image_files import Transparency
from minicpmv_finetune.errors import UserError, describe_validation_error

from .slicing import ResizingLibrary, SlicingConfig

PUBLISHED_LORA_TARGETS = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"
"""Default of `--lora_target_modules` in the published finetune.py, where the language model is called `llm`."""


@dataclass(frozen=True)
class Generation:
    """The properties of one generation of MiniCPM-V.

    Attributes:
        version: Published version, such as "4.6".
        model_type: Value of `model_type` in config.json.
        llm_type: Name of the chat format in the published script; an explicit `--llm_type` must equal it.
        older_llm_types: Other names of the same chat format in published scripts; they are accepted, with a line.
        published_version: Value of `version` in config.json, if several generations have the same `model_type`.
        language_model: Module path of the language model without its head.
        vision_tower: Module path of the vision encoder.
        merger: Module path of the module that converts patch features to input tokens of the language model.
        embed_tokens: Module path of the input embeddings.
        lora_target_modules: Regular expression that replaces the published default of `--lora_target_modules`.
        window_merger: Module path of the merger inside the vision tower, which `downsample_mode: 4x` skips.
        interchangeable_layers: Whether all layers of the language model are of one type, so that layers can be
            replicated.
        fixed_tokens: Whether every slice has the same number of tokens (`query_num` of config.json), computed by a
            resampler; otherwise a merger joins neighboring patches, and the number depends on the slice's size.
        image_token: Placeholder token of one image feature vector.
        image_mark: Text that the chat template writes for an image; it is replaced by the image's tokens.
        image_content: Whether the chat template receives images as list items or as marks within the text.
        assistant_header: Text before an answer.
        end_of_turn: Token that ends an answer; it is supervised with the answer.
        stop_tokens: Tokens that end generation.
        empty_thinking: Text that the template writes before an answer without reasoning. It is not supervised, because
            a prompt for such an answer already ends with it.
        resampler: Library whose bicubic filter the image processor uses.
        transparency: How the image processor removes an alpha channel.
    """

    version: str
    model_type: str
    llm_type: str
    language_model: str
    vision_tower: str
    merger: str
    embed_tokens: str
    lora_target_modules: str
    image_token: str
    image_mark: str
    image_content: Literal["items", "text"]
    assistant_header: str
    end_of_turn: str
    stop_tokens: tuple[str, ...]
    resampler: ResizingLibrary
    transparency: Transparency
    interchangeable_layers: bool = True
    fixed_tokens: bool = False
    published_version: str | None = None
    empty_thinking: str = ""
    older_llm_types: tuple[str, ...] = ()
    window_merger: str | None = None

    def unused_modules(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Module paths of what a checkpoint has but never computes with, so that it cannot be trained.

        Args:
            config: Content of config.json.
        """
        skips_merger = self.window_merger is not None and config.get("downsample_mode") == "4x"
        return (str(self.window_merger),) if skips_merger else ()

    def target_patterns(self, pattern: str) -> tuple[str, str]:
        """A pattern of `--lora_target_modules` as given, and with this generation's name for the language model.

        The first that matches a layer applies; in published scripts the language model is called `llm`.
        """
        if pattern == PUBLISHED_LORA_TARGETS:
            pattern = self.lora_target_modules
        prefix = re.escape(self.language_model).replace("\\", "\\\\") + r"\\."
        return pattern, _LANGUAGE_MODEL_PREFIX.sub(rf"\1{prefix}", pattern)


_LANGUAGE_MODEL_PREFIX = re.compile(r"^(\^?)llm\\\.")
_QWEN3_5_LORA_TARGETS = (
    r"model\.language_model\..*layers\.\d+\."
    # Three of four layers are linear attention, where one projection computes queries, keys and values.
    r"(self_attn\.(q_proj|k_proj|v_proj)|linear_attn\.in_proj_qkv)"
)

MINICPMV_4_6 = Generation(
    version="4.6",
    model_type="minicpmv4_6",
    llm_type="qwen",
    language_model="model.language_model",
    vision_tower="model.vision_tower",
    merger="model.merger",
    window_merger="model.vision_tower.vit_merger",
    embed_tokens="model.language_model.embed_tokens",
    lora_target_modules=_QWEN3_5_LORA_TARGETS,
    interchangeable_layers=False,
    image_token="<|image_pad|>",
    image_mark="<|image_pad|>",
    image_content="items",
    assistant_header="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    resampler="torchvision",
    transparency="white",
)

MINICPMV_4_7 = replace(MINICPMV_4_6, version="4.7", model_type="minicpmv4_7")

MINICPMV_2_6 = Generation(
    version="2.6",
    model_type="minicpmv",
    published_version="2.6",
    llm_type="qwen",
    older_llm_types=("qwen2",),
    language_model="llm.model",
    vision_tower="vpm",
    merger="resampler",
    embed_tokens="llm.model.embed_tokens",
    lora_target_modules=PUBLISHED_LORA_TARGETS,
    fixed_tokens=True,
    image_token="<unk>",
    # No text can contain this mark, because <image> is a special token and such text is refused.
    image_mark="(<image>./</image>)",
    image_content="text",
    assistant_header="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    resampler="pillow",
    transparency="drop",
)

MINICPMV_4_0 = replace(
    MINICPMV_2_6,
    version="4.0",
    published_version="4.0",
    older_llm_types=("llama",),
    stop_tokens=("<|im_end|>", "</s>"),
)

MINICPMV_4_5 = replace(
    MINICPMV_2_6, version="4.5", published_version="4.5", older_llm_types=(), empty_thinking="<think>\n\n</think>\n\n"
)

_SPEECH_MODELS = {"minicpmo"}

GENERATIONS = (MINICPMV_2_6, MINICPMV_4_0, MINICPMV_4_5, MINICPMV_4_6, MINICPMV_4_7)


class _ImageSettings(BaseModel):
    """The fields of the image processor's file that are used here."""

    model_config = ConfigDict(strict=True)

    patch_size: PositiveInt = 14
    max_slice_nums: PositiveInt = 9
    scale_resolution: PositiveInt = 448
    slice_mode: bool = True
    use_image_id: bool = True
    downsample_mode: str = "16x"
    image_feature_size: PositiveInt | None = None


def generation_named(version: str) -> Generation:
    """The generation of a version, such as "4.6"."""
    return next(generation for generation in GENERATIONS if generation.version == version)


def detect_generation(checkpoint: Path) -> Generation:
    """Detect the generation of a checkpoint from its config.json.

    Raises:
        UserError: The folder is not a checkpoint, or a checkpoint of a model that this project does not support.
    """
    path = checkpoint / "config.json"
    return generation_of(read_json(path), str(path))


def generation_of(config: Mapping[str, Any], place: str) -> Generation:
    """The generation of a checkpoint with this config.json.

    Args:
        config: Content of the file.
        place: Where the file is, for the error message.

    Raises:
        UserError: It is the configuration of a model that this project does not support.
    """
    version = config.get("version")
    for generation in GENERATIONS:
        if config.get("model_type") == generation.model_type and (
            generation.published_version is None or generation.published_version == _one_decimal(version)
        ):
            return generation
    known = ", ".join(generation.version for generation in GENERATIONS)
    if str(config.get("model_type")) in _SPEECH_MODELS:
        raise UserError(
            f"{place}: MiniCPM-o, which also hears and speaks, is not supported; give a MiniCPM-V ({known}) as base "
            "model, such as openbmb/MiniCPM-V-4.6, or openbmb/MiniCPM-V-2_6, which MiniCPM-o 2.6 extends."
        )
    raise UserError(
        f"{place}: model_type {config.get('model_type')!r} (version {version!r}) is "
        f"none of the supported MiniCPM-V generations {known}; give one of their checkpoints as base model."
    )


def count_experts(config: Mapping[str, Any]) -> int:
    """Number of experts in each layer of a mixture of experts; 0 if the language model is no such mixture.

    Args:
        config: Content of config.json.
    """
    text = config.get("text_config") or config
    return int(text.get("num_experts") or 0)


def _one_decimal(version: Any) -> str:
    """Format a version, because published files contain 4 for 4.0, and some contain text."""
    try:
        return f"{float(version):.1f}"
    except (TypeError, ValueError):
        return str(version)


def read_slicing_config(checkpoint: Path) -> SlicingConfig:
    """Read how a checkpoint's own processor slices images.

    Raises:
        UserError: The processor's color normalization differs from every published MiniCPM-V, or its patch size differs
            from the vision tower's.
    """
    generation = detect_generation(checkpoint)
    settings = read_image_settings(checkpoint)
    patch_size = settings.get("patch_size", 14)
    for name in ("norm_mean", "norm_std", "image_mean", "image_std"):
        if any(value != 0.5 for value in _as_list(settings.get(name, 0.5))):
            raise UserError(
                f"{checkpoint}: the image processor's {name} is {settings[name]}, but every MiniCPM-V has 0.5; "
                "the processor's file belongs to another model, fetch the checkpoint again."
            )
    expected = (read_json(checkpoint / "config.json").get("vision_config") or {}).get("patch_size", patch_size)
    if expected != patch_size:
        raise UserError(
            f"{checkpoint}: the image processor's patches have {patch_size} pixels, but the vision tower expects "
            f"{expected}; the files belong to different models, fetch the checkpoint again."
        )
    # "4x" merges 2 × 2 patches into a token, "16x" merges 4 × 4; the sides of a slice must be multiples of that.
    merged = 1 if generation.fixed_tokens else 2 if settings.get("downsample_mode", "16x") == "4x" else 4
    return SlicingConfig(
        max_slice_nums=settings.get("max_slice_nums", 9),
        scale_resolution=settings.get("scale_resolution", 448),
        patch_size=patch_size,
        size_multiple=patch_size * merged,
        slice_mode=settings.get("slice_mode", True),
        resampler=generation.resampler,
        transparency=generation.transparency,
    )


def read_tokens_per_slice(checkpoint: Path) -> int | None:
    """Read the number of tokens of a slice; None if it depends on the slice's size.

    Raises:
        UserError: The model's and the processor's files contain different numbers.
    """
    if not detect_generation(checkpoint).fixed_tokens:
        return None
    queries = int(read_json(checkpoint / "config.json").get("query_num", 64))
    features = int(read_image_settings(checkpoint).get("image_feature_size", queries))
    if features != queries:
        raise UserError(
            f"{checkpoint}: a slice has {queries} tokens in config.json (query_num) but {features} in "
            "preprocessor_config.json (image_feature_size); the files belong to different models, fetch the checkpoint "
            "again."
        )
    return queries


def read_image_settings(checkpoint: Path) -> dict[str, Any]:
    """Read the image processor's settings, from processor_config.json or else from preprocessor_config.json.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = checkpoint / "processor_config.json"
    settings = read_json(path).get("image_processor") if path.is_file() else None
    if settings is None:
        path = checkpoint / "preprocessor_config.json"
        settings = read_json(path)
    try:
        _ImageSettings.model_validate(settings)
    except ValidationError as error:
        problem = describe_validation_error(error, "its content")
        raise UserError(f"{path}: {problem}; the checkpoint is damaged, fetch it again.") from error
    return dict(settings)


def write_max_slices(checkpoint: Path, max_slice_nums: int) -> None:
    """Write the number of slices used in training into a saved checkpoint's processor, and config.json if it has one.

    Args:
        checkpoint: Folder of the saved checkpoint.
        max_slice_nums: Largest number of slices of an image.
    """
    for name, part in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", "image_processor"),
        ("config.json", "slice_config"),
    ):
        path = checkpoint / name
        if not path.is_file():
            continue
        document = read_json(path)
        settings = document if name == "preprocessor_config.json" and part not in document else document.get(part)
        if settings is not None:
            settings["max_slice_nums"] = max_slice_nums
            path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        UserError: The file is missing or damaged.
    """
    storage.require_no_file(str(path.parent))
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: there is no {path.name}, so this is not a checkpoint; {_likely_meant(path.parent)}."
        ) from None
    return parse_json(content, str(path))


def _likely_meant(folder: Path) -> str:
    """What to give instead of a folder that is not a checkpoint."""
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter: give the merged model, or where an adapter is asked for too, its base model"
    if (folder / "model" / "config.json").is_file():
        return f"give {folder / 'model'}"
    return "give its folder"


def parse_json(content: bytes, place: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Args:
        content: Content of the file.
        place: Where the file is, for the error message.

    Raises:
        UserError: The file is damaged.
    """
    try:
        document = json.loads(content)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}); the checkpoint is damaged, fetch it again.") from error
    if not isinstance(document, dict):
        raise UserError(f"{place}: not a JSON object; the checkpoint is damaged, fetch it again.")
    return document
