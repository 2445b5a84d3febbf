"""PEFT adapters: their configuration, and loading them completely and onto a base model that they fit.

PEFT ignores tensors that the model has no place for, and starts modules that are trained whole from the base's values
if the file has none. Here such an adapter is an error, because a model that is loaded in part trains and answers, but
wrongly.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError, describe_validation_error

from .checkpoint import load_model

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PEFT_PREFIX = "base_model.model."
"""How PEFT begins the names of modules and parameters of a model that it wraps."""

# Other programs read these without a default of their own.
_ALWAYS_WRITTEN = {
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias"),
    *("target_modules", "modules_to_save"),
}


class _UsedFields(BaseModel):
    """The fields of an adapter's configuration that this program uses."""

    peft_type: str
    r: PositiveInt
    lora_alpha: float
    rank_pattern: dict[str, PositiveInt]
    alpha_pattern: dict[str, float]
    init_lora_weights: bool | str | None
    layer_replication: list[tuple[int, int]] | None
    use_dora: bool
    use_rslora: bool
    lora_bias: bool
    ensure_weight_tying: bool


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a LoRA adapter, with PEFT's defaults for fields that it leaves out.

    Raises:
        UserError: There is none, it is damaged, or it describes another kind of adapter.
    """
    from peft import LoraConfig

    storage.require_no_file(str(folder))
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder}: there is no {ADAPTER_CONFIG}, so this is not a PEFT adapter; give the train step's output, an "
            "adapter folder."
        )
    try:
        config = LoraConfig().to_dict() | dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the adapter is damaged, copy it again.") from error
    if config["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type {config['peft_type']!r} is not supported; train a LORA adapter.")
    try:
        _UsedFields.model_validate(config)
    except ValidationError as error:
        raise UserError(
            f"{path}: {describe_validation_error(error)}; the adapter is damaged, copy it again."
        ) from error
    return config


def make_readable_by_older_versions(folder: Path) -> None:
    """Leave out of an adapter's configuration what has PEFT's default, except what every version knows.

    A version of PEFT before 0.14 refuses fields that it does not know, and each version writes all of its own.
    """
    from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    defaults = json.loads(json.dumps(LoraConfig().to_dict()))
    config = json.loads(path.read_text())
    kept = {name: value for name, value in config.items() if name in _ALWAYS_WRITTEN or value != defaults.get(name)}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def put_adapter(model: PreTrainedModel, folder: Path, base: str, is_trainable: bool = False) -> "PeftModel":
    """Put an adapter on a loaded base model, without merging it into the weights.

    Args:
        model: The base model.
        folder: Local folder of the adapter.
        base: Address of the base model, for the error message.
        is_trainable: Whether the adapter will be trained further.

    Raises:
        UserError: The adapter is damaged, or does not fit the base model.
    """
    from peft import PeftModel

    read_adapter_config(folder)
    stored = _read_shapes(folder)
    try:
        with warnings.catch_warnings():
            # Missing tensors are an error below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # PEFT itself reads this attribute by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except KeyError as error:
        raise _does_not_fit(folder, base, f"the file lacks {error.args[0]}") from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise _does_not_fit(folder, base, _describe(error)) from error
    _require_all_tensors(adapted, stored, folder, base)
    for name, parameter in adapted.named_parameters():
        of_adapter = ".lora_" in name or ".modules_to_save." in name
        if of_adapter and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{folder}: {name} contains NaN or infinity; the adapter is damaged, copy it again or train it again."
            )
    update_layer_types(model)
    loaded: PeftModel = adapted
    return loaded


def load_with_adapter(base: Path, adapter: Path, dtype: torch.dtype | None = None, **options: Any) -> PreTrainedModel:
    """Load a base model with a PEFT adapter, without merging the adapter into the weights.

    Args:
        base: Local folder of the base model's checkpoint.
        adapter: Local folder of the adapter.
        dtype: Type of the weights in memory; by default the type in the file.
        **options: Further arguments of `from_pretrained`, such as `attn_implementation`.

    Raises:
        UserError: One of the two cannot be loaded, or the adapter was trained on another base model.
    """
    read_adapter_config(adapter)
    model, _ = load_model(base, dtype, **options)
    adapted: Any = put_adapter(model, adapter, str(base))
    wrapped: PreTrainedModel = adapted
    return wrapped


def update_layer_types(model: PreTrainedModel) -> None:
    """Extend the configuration's list of layer types to the layers that PEFT has replicated.

    PEFT raises the number of layers in the configuration, but not the length of the list of their types. Only models
    whose layers are all of one type can have replicated layers.
    """
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types and len(types) != config.num_hidden_layers:
        config.layer_types = [types[0]] * config.num_hidden_layers


def save_adapter(model: "PeftModel", weights: Mapping[str, torch.Tensor], folder: Path, base: str) -> None:
    """Write an adapter as PEFT does, with the address of the base model that the user gave.

    Args:
        model: Model with the adapter.
        weights: Gathered weights of the adapter.
        folder: Folder that receives the adapter.
        base: Address of the base model, instead of the folder of the download.
    """
    with _without_base_address(model):
        model.save_pretrained(str(folder), state_dict=weights)
    path = folder / ADAPTER_CONFIG
    document = {**json.loads(path.read_text()), "base_model_name_or_path": base}
    path.write_text(json.dumps(document, indent=2, sort_keys=True))


def subtract_first_values(model: "PeftModel", first: Mapping[str, torch.Tensor], weights: Path) -> None:
    """Make a file of weights that of a plain adapter, where training began with a part of the base's weights.

    The base lacks s·B₀·A₀ in training, so the change to the base as it is on disk is s·(B·A - B₀·A₀), an adapter of
    twice the rank. PEFT joins the factors.

    Args:
        model: Model with the adapter.
        first: A₀ and B₀ of each layer, by their names in the file.
        weights: The file, which is replaced.
    """
    trained = load_file(weights)
    adapted = {
        name.removeprefix("base_model.").removesuffix(".weight") + f".{model.active_adapter}.weight": value
        for name, value in first.items()
    }
    tuner: Any = model.base_model
    state = {**tuner.state_dict(), **adapted}
    with _without_base_address(model):
        joined = tuner.subtract_mutated_init(trained, model.active_adapter, {"state_dict": state})
    save_file({**trained, **joined}, weights, metadata={"format": "pt"})


def double_rank(folder: Path) -> None:
    """Write into an adapter's configuration what `subtract_first_values` has made of its weights."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    config["r"] *= 2
    # The factor of the update stays alpha / r, or alpha / sqrt(r) in rsLoRA.
    config["lora_alpha"] *= math.sqrt(2) if config.get("use_rslora") else 2
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def _without_base_address(model: "PeftModel") -> Iterator[None]:
    """Keep PEFT from looking for the base model's config.json on the hub, and warning that it is not there.

    PEFT would only learn whether the vocabulary was changed, which nothing here does; and an address such as `s3://…`
    is no name on the hub.
    """
    addresses = {name: config.base_model_name_or_path for name, config in model.peft_config.items()}
    for config in model.peft_config.values():
        config.base_model_name_or_path = ""
    try:
        yield
    finally:
        for name, address in addresses.items():
            model.peft_config[name].base_model_name_or_path = address


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors by their names, from the header of its file."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: there is no {ADAPTER_WEIGHTS}; the adapter is incomplete, copy it again.")
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the adapter is damaged, copy it again.") from error


def _require_all_tensors(adapted: Any, stored: Mapping[str, tuple[int, ...]], folder: Path, base: str) -> None:
    """Refuse an adapter file that lacks tensors of the adapted model, or has some that the model has no place for."""
    from peft import get_peft_model_state_dict

    with _without_base_address(adapted):
        expected = get_peft_model_state_dict(adapted).keys()
    # Older versions of PEFT also saved the original tensors that the trained ones replace.
    unexpected = [name for name in stored if name not in expected and ".original_module." not in name]
    for names, reason in (
        (expected - stored.keys(), "the file lacks"),
        (unexpected, "the model has no place for"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise _does_not_fit(folder, base, f"{reason} {', '.join(sorted(names)[:3])}{more}")


def _does_not_fit(folder: Path, base: str, reason: str) -> UserError:
    return UserError(
        f"{folder}: the adapter does not fit the base model {base} ({reason}); give the base model that the adapter "
        "was trained on, or copy the adapter again."
    )


def _describe(error: Exception) -> str:
    """The first line of an error that says more than that something went wrong."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return (lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else lines[0])[:300]
