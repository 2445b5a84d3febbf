"""Loading checkpoints, always completely, and copying the files of a checkpoint that are not weights.

`from_pretrained` only warns about tensors that are missing or have another shape, and initializes them at random. Here
such a checkpoint is an error, because a model that is loaded in part trains and answers, but wrongly.
"""

import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from minicpmv_finetune.errors import UserError

from .generations import Generation, detect_generation

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
ADAPTER_CONFIG = "adapter_config.json"
_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK_BYTES = 64, 65_536  # for each weight file


def load_model(
    checkpoint: Path, dtype: torch.dtype | None = None, **options: Any
) -> tuple[PreTrainedModel, Generation]:
    """Load a base, merged or fully fine-tuned model.

    Args:
        checkpoint: Local folder of the checkpoint.
        dtype: Type of the weights in memory; by default the type in the file.
        **options: Further arguments of `from_pretrained`, such as `attn_implementation`.

    Returns:
        The model and its generation.

    Raises:
        UserError: The checkpoint is of another architecture, or tensors are missing, unexpected, of another shape, or
            contain NaN or infinity.
    """
    from . import modeling, modeling_qwen3_5  # noqa: F401 - registers this project's classes in transformers

    generation = detect_generation(checkpoint)
    model: PreTrainedModel
    load: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model, report = load(
            checkpoint,
            dtype=dtype or "auto",
            output_loading_info=True,
            # Mismatched tensors are an error too; with this flag the report contains their names.
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint}: the weights cannot be loaded ({error}); fetch the checkpoint again.") from error
    _require_all_tensors(checkpoint, generation, report)
    _require_finite_weights(checkpoint, model)
    return model, generation


def _require_all_tensors(checkpoint: Path, generation: Generation, report: dict[str, Any]) -> None:
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"])
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"{checkpoint}: {kind} tensors {listed}; the checkpoint is not a complete MiniCPM-V "
                f"{generation.version}, fetch it again."
            )


def _require_finite_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        # Quantized weights are integers, and weights on the meta device have no values.
        checked = parameter.is_floating_point() and not parameter.is_meta
        if checked and not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{checkpoint}: {name} contains NaN or infinity; the checkpoint is damaged, fetch it again or use an "
                "earlier one."
            )


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
    from peft import PeftModel

    if not (adapter / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{adapter}: there is no {ADAPTER_CONFIG}, so this is not a PEFT adapter; give the train step's output."
        )
    model, _ = load_model(base, dtype, **options)
    try:
        with warnings.catch_warnings():
            # PEFT only warns about missing keys, but an adapter that is loaded in part must be an error.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # PEFT itself reads this attribute by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, UserWarning) as error:
        raise UserError(
            f"{adapter}: the adapter does not fit the base model {base} ({str(error).strip().splitlines()[0]}); give "
            "the base model that the adapter was trained on."
        ) from error
    update_layer_types(model)
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


def fingerprint(checkpoint: Path) -> str:
    """Compute a value that distinguishes a base model from every other, in about a second for a model of any size.

    Returns:
        sha256 of config.json and, for each weight file, of its length and of 64 blocks of 64 KB spread evenly over the
        file, including its header. A change of single weights may not change the value; another model, or the same
        model after training, does.
    """
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for block in range(_FINGERPRINT_BLOCKS):
                file.seek(block * max(size - _FINGERPRINT_BLOCK_BYTES, 0) // (_FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(_FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()


def copy_non_weight_files(source: Path, destination: Path) -> None:
    """Copy every file of a checkpoint except its weights, so that a folder with new weights can replace it.

    Files and folders whose names begin with a dot are not copied.

    Args:
        source: Folder of the checkpoint.
        destination: Folder that receives the files.
    """
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_dir() or any(part.startswith(".") for part in relative.parts):
            continue
        if any(path.match(pattern) for pattern in WEIGHT_PATTERNS):
            continue
        target = destination / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
