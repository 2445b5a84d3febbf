"""Loading checkpoints, always completely, and copying the files of a checkpoint that are not weights.

`from_pretrained` only warns about tensors that are missing or have another shape, and initializes them at random. Here
such a checkpoint is an error, because a model that is loaded in part trains and answers, but wrongly.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging as transformers_logging

from minicpmv_finetune.errors import UserError

from .generations import Generation, detect_generation

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK_BYTES = 64, 65_536  # for each weight file


def load_model(
    checkpoint: Path, dtype: torch.dtype | None = None, checked_part: tuple[int, int] = (0, 1), **options: Any
) -> tuple[PreTrainedModel, Generation]:
    """Load a base, merged or fully fine-tuned model.

    Args:
        checkpoint: Local folder of the checkpoint.
        dtype: Type of the weights in memory; by default the type in the file.
        checked_part: Which part of the weights is searched for NaN and infinity, and of how many: processes that load
            the same weights may share the work.
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
        with _without_bars():
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
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{checkpoint}: the GPU has too little free memory for the weights; end what else uses it, or take a GPU "
            "with more."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint}: the weights cannot be loaded ({error}); fetch the checkpoint again.") from error
    _require_all_tensors(checkpoint, generation, report)
    _require_finite_weights(checkpoint, model, *checked_part)
    return model, generation


@contextmanager
def _without_bars() -> Iterator[None]:
    """Let transformers draw no bar for a block, also in a program that has not chosen so and only calls `load`."""
    before = transformers_logging.set_tqdm_hook(
        lambda make, arguments, options: make(*arguments, **{**options, "disable": True})
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def _require_all_tensors(checkpoint: Path, generation: Generation, report: dict[str, Any]) -> None:
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"])
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"{checkpoint}: {kind} tensors {listed}; the checkpoint is not a complete MiniCPM-V "
                f"{generation.version}, fetch it again."
            )


def _require_finite_weights(checkpoint: Path, model: PreTrainedModel, part: int, parts: int) -> None:
    for name, parameter in list(model.named_parameters())[part::parts]:
        # Quantized weights are integers, and weights on the meta device, or divided by ZeRO-3, have no values here.
        if parameter.is_floating_point() and not parameter.is_meta and not _is_finite(parameter.detach()):
            raise UserError(
                f"{checkpoint}: {name} contains NaN or infinity; the checkpoint is damaged, fetch it again or use an "
                "earlier one."
            )


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity; most need one pass without a temporary tensor, their sum."""
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


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
