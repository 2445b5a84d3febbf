"""One description per model generation: everything that differs between them, in one place.

The steps ask this description and hold no `if version == …`. It is read from a checkpoint's JSON files alone, so a
wrong base model is refused in a tenth of a second, before torch is imported or a weight is read.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from minicpmv_finetune.data.image_files import Transparency
from minicpmv_finetune.errors import UserError, describe_validation_error

from .slicing import Resampler, SlicingConfig

PUBLISHED_LORA_TARGETS = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"
"""Default of `--lora_target_modules` in the published finetune.py; it names the language model `llm`."""


@dataclass(frozen=True)
class Generation:
    """What one generation of MiniCPM-V is made of.

    Attributes:
        version: as published, such as "4.6".
        model_type: of config.json.
        llm_type: the published script's name for the chat format; an explicit `--llm_type` must equal it.
        older_llm_types: names that earlier published scripts had for it.
        published_version: of config.json, where several generations share a model_type.
        language_model: module path of the language model without its head.
        vision_tower: module path of the vision encoder.
        merger: module path of what turns patch features into the language model's tokens.
        embed_tokens: module path of the input embeddings.
        lora_target_modules: regular expression that replaces the published default.
        interchangeable_layers: whether the language model's layers are of one kind, so that they can be stacked anew.
        fixed_tokens: whether a resampler turns every slice into the same number of tokens (`query_num` of config.json),
            or a merger joins neighbouring patches.
        image_token: token that stands for one feature vector.
        image_mark: what the chat template writes for an image, replaced by its tokens.
        image_content: whether the template takes images as list items or as marks within the text.
        assistant_header: what stands before an answer.
        end_of_turn: what ends an answer, and is learnt with it.
        stop_tokens: what ends generation.
        empty_thinking: what the template puts before an answer given without reasoning; not learnt, since the prompt
            that asks for such an answer already ends with it.
        resampler: whose bicubic filter the processor uses.
        transparency: what the processor does with an alpha channel.
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
    resampler: Resampler
    transparency: Transparency
    interchangeable_layers: bool = True
    fixed_tokens: bool = False
    published_version: str | None = None
    empty_thinking: str = ""
    older_llm_types: tuple[str, ...] = ()


_QWEN3_5_LORA_TARGETS = (
    r"model\.language_model\..*layers\.\d+\."
    # Three of four layers are linear attention, whose queries, keys and values are one projection.
    r"(self_attn\.(q_proj|k_proj|v_proj)|linear_attn\.in_proj_qkv)"
)

MINICPMV_4_6 = Generation(
    version="4.6",
    model_type="minicpmv4_6",
    llm_type="qwen",
    language_model="model.language_model",
    vision_tower="model.vision_tower",
    merger="model.merger",
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
    # No text can hold it, since <image> is a special token.
    image_mark="(<image>./</image>)",
    image_content="text",
    assistant_header="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    resampler="pillow",
    transparency="drop",
)

MINICPMV_4_0 = replace(
    MINICPMV_2_6, version="4.0", published_version="4.0", older_llm_types=(), stop_tokens=("<|im_end|>", "</s>")
)

MINICPMV_4_5 = replace(
    MINICPMV_2_6, version="4.5", published_version="4.5", older_llm_types=(), empty_thinking="<think>\n\n</think>\n\n"
)

GENERATIONS = (MINICPMV_2_6, MINICPMV_4_0, MINICPMV_4_5, MINICPMV_4_6, MINICPMV_4_7)


class _ImageSettings(BaseModel):
    """What the image processor's file says, as far as it is used here."""

    model_config = ConfigDict(strict=True)

    patch_size: PositiveInt = 14
    max_slice_nums: PositiveInt = 9
    scale_resolution: PositiveInt = 448
    slice_mode: bool = True
    use_image_id: bool = True
    downsample_mode: str = "16x"
    image_feature_size: PositiveInt | None = None


def detect_generation(checkpoint: Path) -> Generation:
    """Which generation a checkpoint folder holds.

    Raises:
        UserError: it is no checkpoint, or of a model this project does not train.
    """
    config = read_json(checkpoint / "config.json")
    version = config.get("version")
    for generation in GENERATIONS:
        if config.get("model_type") == generation.model_type and (
            generation.published_version is None or generation.published_version == _one_decimal(version)
        ):
            return generation
    known = ", ".join(generation.version for generation in GENERATIONS)
    raise UserError(
        f"{checkpoint / 'config.json'}: model_type {config.get('model_type')!r} (version {version!r}) is "
        f"none of the supported MiniCPM-V generations {known}; give one of their checkpoints as base model."
    )


def _one_decimal(version: Any) -> str:
    """Published files write 4 for 4.0, and some write text."""
    try:
        return f"{float(version):.1f}"
    except (TypeError, ValueError):
        return str(version)


def read_slicing_config(checkpoint: Path) -> SlicingConfig:
    """How a checkpoint's own processor slices images.

    Raises:
        UserError: the processor normalizes colours otherwise than every published MiniCPM-V, or cuts patches of
            another size than the vision tower takes.
    """
    generation = detect_generation(checkpoint)
    settings = read_image_settings(checkpoint)
    patch_size = settings.get("patch_size", 14)
    for name in ("norm_mean", "norm_std", "image_mean", "image_std"):
        if any(value != 0.5 for value in _as_list(settings.get(name, 0.5))):
            raise UserError(
                f"{checkpoint}: the image processor's {name} is {settings[name]}, where every MiniCPM-V has 0.5; "
                "the processor's file belongs to another model, fetch the checkpoint again."
            )
    expected = (read_json(checkpoint / "config.json").get("vision_config") or {}).get("patch_size", patch_size)
    if expected != patch_size:
        raise UserError(
            f"{checkpoint}: the image processor cuts patches of {patch_size} pixels, but the vision tower takes "
            f"{expected}; the files belong to different models, fetch the checkpoint again."
        )
    # "4x" merges 2 × 2 patches into a token, "16x" twice so: slices must divide evenly.
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
    """How many tokens stand for a slice, whatever its size; None where that depends on the size.

    Raises:
        UserError: the model and its processor disagree.
    """
    if not detect_generation(checkpoint).fixed_tokens:
        return None
    queries = int(read_json(checkpoint / "config.json").get("query_num", 64))
    told = int(read_image_settings(checkpoint).get("image_feature_size", queries))
    if told != queries:
        raise UserError(
            f"{checkpoint}: config.json gives a slice {queries} tokens (query_num), preprocessor_config.json {told} "
            "(image_feature_size); the files belong to different models, fetch the checkpoint again."
        )
    return queries


def read_image_settings(checkpoint: Path) -> dict[str, Any]:
    """The image processor's settings, from whichever of its two files the checkpoint has."""
    path = checkpoint / "processor_config.json"
    settings = read_json(path).get("image_processor") if path.is_file() else None
    if settings is None:
        path = checkpoint / "preprocessor_config.json"
        settings = read_json(path)
    try:
        _ImageSettings.model_validate(settings)
    except ValidationError as error:
        what = describe_validation_error(error, "its content")
        raise UserError(f"{path}: {what}; the checkpoint is damaged, fetch it again.") from error
    return dict(settings)


def write_max_slices(checkpoint: Path, max_slice_nums: int) -> None:
    """Make a saved checkpoint's processor slice as its training did; and its config say so, where that has a word."""
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
    """A checkpoint's JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} here, so this is no checkpoint; give its folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the checkpoint is damaged, fetch it again.") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no JSON object; the checkpoint is damaged, fetch it again.")
    return document
