"""Loading checkpoints whole and never in part, and carrying their other files along."""

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
_BLOCKS, _BLOCK_BYTES = 64, 65_536


def load_model(
    checkpoint: Path, dtype: torch.dtype | None = None, **options: Any
) -> tuple[PreTrainedModel, Generation]:
    """Load a base, merged or fully fine-tuned model.

    Args:
        checkpoint: a local folder.
        dtype: of the weights in memory; by default that of the file.
        **options: further arguments of `from_pretrained`, such as `attn_implementation`.

    Raises:
        UserError: the folder is of another architecture, or tensors are missing, surplus, of another shape or
            hold NaN.
    """
    from . import modeling, modeling_qwen3_5  # noqa: F401 - tell transformers which classes to load

    generation = detect_generation(checkpoint)
    model: PreTrainedModel
    load: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model, report = load(
            checkpoint,
            dtype=dtype or "auto",
            output_loading_info=True,
            # Not to go on with them, but to be told their names.
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint}: the weights cannot be loaded ({error}); fetch the checkpoint again.") from error
    problems = {
        kind: sorted(key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"])
        for kind in ("missing", "unexpected", "mismatched")
    }
    for kind, names in problems.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"{checkpoint}: {kind} tensors {shown}; the checkpoint is not a whole MiniCPM-V "
                f"{generation.version}, fetch it again."
            )
    for name, parameter in model.named_parameters():
        known = parameter.is_floating_point() and not parameter.is_meta
        if known and not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{checkpoint}: {name} holds values that are no numbers (NaN or infinite); the checkpoint is damaged, "
                "fetch it again or take an earlier one."
            )
    return model, generation


def load_with_adapter(base: Path, adapter: Path, dtype: torch.dtype | None = None, **options: Any) -> PreTrainedModel:
    """Load a base model with a PEFT adapter on top, unmerged.

    Raises:
        UserError: either cannot be loaded, or they do not belong together.
    """
    from peft import PeftModel

    if not (adapter / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{adapter}: no {ADAPTER_CONFIG} here, so this is no PEFT adapter; give the train step's output."
        )
    model, _ = load_model(base, dtype, **options)
    try:
        with warnings.catch_warnings():
            # PEFT warns of missing keys and goes on; a half-loaded adapter must not pass as a whole one.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # PEFT asks for it by the name it had before.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, UserWarning) as error:
        raise UserError(
            f"{adapter}: does not fit the base model {base} ({str(error).strip().splitlines()[0]}); give the base it "
            "was trained on."
        ) from error
    update_layer_types(model)
    wrapped: PreTrainedModel = adapted
    return wrapped


def update_layer_types(model: PreTrainedModel) -> None:
    """Tell the configuration of layers that PEFT has replicated.

    PEFT raises the number of layers and leaves the list of their kinds as short as it was. Only models with layers of
    one kind are replicated.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds and len(kinds) != config.num_hidden_layers:
        config.layer_types = [kinds[0]] * config.num_hidden_layers


def fingerprint(checkpoint: Path) -> str:
    """Tell a base model from every other, in a second whatever its size.

    Returns:
        sha256 of the config and, of each weight file, its length and 64 blocks of 64 KB spread over it, the header
        among them. A change to single weights may be missed; another model, or the same one tuned, is not.
    """
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(block * max(size - _BLOCK_BYTES, 0) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def copy_non_weight_files(source: Path, destination: Path) -> None:
    """Copy every file of a checkpoint folder but its weights, so that the copy is a drop-in for it."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_dir() or any(part.startswith(".") for part in relative.parts):
            continue
        if any(path.match(pattern) for pattern in WEIGHT_PATTERNS):
            continue
        target = destination / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
