"""One description per model generation: everything that differs between them, in one place.

The steps ask this description and hold no `if version == …`. It is read from a checkpoint's JSON files alone, so a
wrong base model is refused in a tenth of a second, before torch is imported or a weight is read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .slicing import Resampler, SlicingConfig, Transparency

PUBLISHED_LORA_TARGETS = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"
"""Default of `--lora_target_modules` in the published finetune.py; it names the language model `llm`."""


@dataclass(frozen=True)
class Generation:
    """What one generation of MiniCPM-V is made of.

    Attributes:
        version: as published, such as "4.6".
        model_type: of config.json.
        llm_type: the published script's name for the chat format; an explicit `--llm_type` must equal it.
        language_model: module path of the language model without its head.
        vision_tower: module path of the vision encoder.
        merger: module path of what turns patch features into the language model's tokens.
        embed_tokens: module path of the input embeddings.
        lora_target_modules: regular expression that replaces the published default.
        picture_token: token that stands for one feature vector.
        picture_mark: what the chat template writes for a picture, replaced by its tokens.
        picture_content: whether the template takes pictures as list items or as marks within the text.
        assistant_header: what stands before an answer.
        end_of_turn: what ends an answer, and is learnt with it.
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
    picture_token: str
    picture_mark: str
    picture_content: Literal["items", "text"]
    assistant_header: str
    end_of_turn: str
    resampler: Resampler
    transparency: Transparency


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
    picture_token="<|image_pad|>",
    picture_mark="<|image_pad|>",
    picture_content="items",
    assistant_header="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    resampler="torchvision",
    transparency="white",
)

GENERATIONS = (MINICPMV_4_6,)


def generation_of(checkpoint: Path) -> Generation:
    """Which generation a checkpoint folder holds.

    Raises:
        UserError: it is no checkpoint, or of a model this project does not train.
    """
    config = _read_json(checkpoint / "config.json")
    for generation in GENERATIONS:
        if config.get("model_type") == generation.model_type:
            return generation
    known = ", ".join(generation.version for generation in GENERATIONS)
    raise UserError(
        f"{checkpoint / 'config.json'}: model_type {config.get('model_type')!r} (version {config.get('version')!r}) is "
        f"none of the supported MiniCPM-V generations {known}; give one of their checkpoints as base model."
    )


def slicing_of(checkpoint: Path) -> SlicingConfig:
    """How a checkpoint's own processor slices pictures."""
    generation = generation_of(checkpoint)
    settings = read_image_settings(checkpoint)
    patch_size = settings.get("patch_size", 14)
    # "4x" merges 2 × 2 patches into a token, "16x" twice so: slices must divide evenly.
    merged = 2 if settings.get("downsample_mode", "16x") == "4x" else 4
    return SlicingConfig(
        max_slice_nums=settings.get("max_slice_nums", 9),
        scale_resolution=settings.get("scale_resolution", 448),
        patch_size=patch_size,
        size_multiple=patch_size * merged,
        slice_mode=settings.get("slice_mode", True),
        resampler=generation.resampler,
        transparency=generation.transparency,
    )


def read_image_settings(checkpoint: Path) -> dict[str, Any]:
    """The image processor's settings, from whichever of its two files the checkpoint has."""
    nested = checkpoint / "processor_config.json"
    if nested.is_file():
        settings = _read_json(nested).get("image_processor")
        if settings is not None:
            return dict(settings)
    return _read_json(checkpoint / "preprocessor_config.json")


def write_max_slices(checkpoint: Path, max_slice_nums: int) -> None:
    """Make a saved checkpoint's processor slice as its training did."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = checkpoint / name
        if not path.is_file():
            continue
        document = _read_json(path)
        settings = document.get("image_processor", document)
        if "image_processor" in document or name == "preprocessor_config.json":
            settings["max_slice_nums"] = max_slice_nums
            path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} here, so this is no checkpoint; give its folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the checkpoint is damaged, fetch it again.") from error
