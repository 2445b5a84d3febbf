"""The changes that training made: the new values of the base's tensors.

A PEFT adapter changes a tensor in four ways: a low-rank product is added (LoRA), its rows or columns are rescaled to
learned lengths (DoRA), a term is added to a bias, or the tensor is replaced as a whole (`modules_to_save`, trained
biases). A full fine-tune replaces every tensor. Everything else in a configuration or a file is refused by name,
because a merge without it would look complete and give wrong answers.

The arithmetic is that of PEFT's `merge_and_unload` (the tests compare both), in float32 and on a block of rows at a
time.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.adapters import ADAPTER_CONFIG, PEFT_PREFIX, read_adapter_config

from .weights import StoredTensor, cast, read_headers, read_rows, row_blocks

# PEFT may also save the original tensors that the trained ones replace, and with bias="all" some tensors twice.
_NOT_IN_USE = re.compile(r"\.(original_module|modules_to_save)\.")
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)"
)
# Fields of the configuration that decide what is trained and how, but not how it is merged.
_TRAINING_ONLY = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_dropout", "init_lora_weights", "runtime_config", "eva_config"),
}
_MERGED = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("layer_replication", "ensure_weight_tying"),
}
# The other initializations also change the base's weights, and the base on disk does not have that change.
_INITIALIZATIONS_WITHOUT_BASE_CHANGE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Update:
    """The change of one tensor.

    Attributes:
        replacement: Values that replace the base's.
        up: Left factor of the LoRA product, [rows, r] on disk or [r, rows] for an embedding.
        down: Right factor of the LoRA product, [r, columns] on disk or [columns, r] for an embedding.
        scale: Factor of the LoRA product and of `addition`.
        is_embedding: Whether the factors are stored transposed, and DoRA scales columns instead of rows.
        magnitude: DoRA's lengths of the rows, or of the columns for an embedding.
        addition: Values that are added to a bias, times `scale`.
    """

    replacement: StoredTensor | None = None
    up: StoredTensor | None = None
    down: StoredTensor | None = None
    scale: float = 1.0
    is_embedding: bool = False
    magnitude: StoredTensor | None = None
    addition: StoredTensor | None = None

    def check(self, name: str, base: StoredTensor) -> None:
        """Refuse an update that does not fit its tensor.

        Raises:
            UserError: A shape differs, or the adapted layer is not linear.
        """
        expected: dict[StoredTensor | None, tuple[int, ...]] = {
            self.replacement: base.shape,
            self.addition: base.shape,
        }
        if self.up is not None and self.down is not None:
            if len(base.shape) != 2 or len(self.up.shape) != 2:
                raise UserError(
                    f"{self.up.path}: {self.up.name} adapts a layer that is not linear; only adapters of linear layers "
                    "and embeddings can be merged."
                )
            rows, columns = base.shape
            rank = self.up.shape[0] if self.is_embedding else self.up.shape[1]
            expected[self.up] = (rank, rows) if self.is_embedding else (rows, rank)
            expected[self.down] = (columns, rank) if self.is_embedding else (rank, columns)
            expected[self.magnitude] = (columns,) if self.is_embedding else (rows,)
        for tensor, shape in expected.items():
            if tensor is not None and tensor.shape != shape:
                raise UserError(
                    f"{tensor.path}: {tensor.name} is {list(tensor.shape)}, but {name} of the base model is "
                    f"{list(base.shape)}; give the base that the adapter was trained on."
                )

    def blocks(self, base: StoredTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Compute the merged values, some rows at a time.

        Yields:
            The base's values and the merged ones, both in the stored type; merged in float32 and cast once.
        """
        up, down = self._factors()
        magnitude = None if self.magnitude is None else read_rows(self.magnitude).float()
        if magnitude is not None and self.is_embedding:
            # The length of a column is known only after all rows.
            squares = torch.zeros(base.shape[1], dtype=torch.float64)
            for start, end in row_blocks(base):
                values = self._changed_rows(read_rows(base, start, end), start, end, up, down)
                squares += torch.linalg.vector_norm(values, dim=0).double().square()
            magnitude = magnitude / squares.sqrt().float()
        for start, end in row_blocks(base):
            before = read_rows(base, start, end)
            if self.replacement is not None and up is None:
                yield before, cast(read_rows(self.replacement, start, end), base.dtype)
                continue
            values = self._changed_rows(before, start, end, up, down)
            if magnitude is not None and self.is_embedding:
                values *= magnitude
            elif magnitude is not None:
                values *= (magnitude[start:end] / torch.linalg.vector_norm(values, dim=1)).unsqueeze(1)
            yield before, cast(values, base.dtype)

    def _changed_rows(
        self, before: torch.Tensor, start: int, end: int, up: torch.Tensor | None, down: torch.Tensor | None
    ) -> torch.Tensor:
        """The base's rows after replacement and addition, before DoRA's scaling, in float32."""
        rows = before if self.replacement is None else read_rows(self.replacement, start, end)
        values = rows.to(torch.float32, copy=True)
        if up is not None and down is not None:
            values.addmm_(up[start:end], down)
        if self.addition is not None:
            values += read_rows(self.addition, start, end).float() * self.scale
        return values

    def _factors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.up is None or self.down is None:
            return None, None
        up, down = read_rows(self.up).float(), read_rows(self.down).float()
        if self.is_embedding:
            up, down = up.T, down.T
        return up * self.scale, down


@dataclass(frozen=True)
class Updates:
    """All changes that training made.

    Attributes:
        by_tensor: Update of each changed tensor, by the tensor's name in the loaded model.
        layer_replication: Ranges of the base's layers that are stacked to the merged model's layers; empty for none.
        keeps_ties: Whether tensors that are one in the base remain one.
    """

    by_tensor: Mapping[str, Update]
    layer_replication: tuple[tuple[int, int], ...] = ()
    keeps_ties: bool = True


def read_full_fine_tune(folder: Path, names: Mapping[str, str]) -> Updates:
    """Read a full fine-tune, whose tensors replace the base's.

    Args:
        folder: Output of the train step.
        names: Names of its tensors in the loaded model, by the names in its files.
    """
    tensors = [tensor for file in read_headers(folder) for tensor in file.tensors]
    return Updates({names[tensor.name]: Update(replacement=tensor) for tensor in tensors})


def read_adapter(folder: Path) -> Updates:
    """Read the changes of a PEFT adapter.

    Raises:
        UserError: The configuration or a file contains anything that this module does not support.
    """
    config = _read_config(folder)
    updates: dict[str, Update] = {}
    parts: dict[str, _LoraParts] = {}
    tensors = {tensor.name: tensor for file in read_headers(folder) for tensor in file.tensors}
    for key, tensor in tensors.items():
        if not key.startswith(PEFT_PREFIX):
            raise UserError(f"{tensor.path}: {key} is not the name of a PEFT adapter tensor; give a PEFT adapter.")
        name = key.removeprefix(PEFT_PREFIX)
        if _NOT_IN_USE.search(name):
            continue
        if found := _PART.fullmatch(name):
            parts.setdefault(found["module"], _LoraParts()).tensors[found["part"]] = tensor
        else:
            updates[name.replace(".base_layer.", ".")] = Update(replacement=tensor)
    for module, lora in parts.items():
        for name, update in lora.updates(module, config, folder).items():
            before = updates.get(name)
            updates[name] = update if before is None else replace(update, replacement=before.replacement)
    return Updates(
        updates,
        tuple((int(start), int(end)) for start, end in config["layer_replication"] or ()),
        # With ensure_weight_tying PEFT trains one tensor for both uses, as in the base.
        keeps_ties=bool(config["ensure_weight_tying"]),
    )


@dataclass
class _LoraParts:
    """The adapter tensors of one module."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def updates(self, module: str, config: Mapping[str, Any], folder: Path) -> dict[str, Update]:
        """The updates of the module's weight and bias, by the tensor's name."""
        parts = dict(self.tensors)
        is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        down = parts.pop("lora_embedding_A" if is_embedding else "lora_A.weight", None)
        up = parts.pop("lora_embedding_B" if is_embedding else "lora_B.weight", None)
        magnitude = parts.pop("lora_magnitude_vector", None)
        addition = parts.pop("lora_B.bias", None)
        if up is None or down is None or parts:
            raise UserError(
                f"{folder}: {module} has only the tensors {', '.join(self.tensors)}; the adapter is incomplete, copy "
                "it again."
            )
        if (magnitude is not None) != config["use_dora"] or (addition is not None) != config["lora_bias"]:
            raise UserError(
                f"{folder}: {module} has the tensors {', '.join(self.tensors)}, but {ADAPTER_CONFIG} has use_dora "
                f"{config['use_dora']} and lora_bias {config['lora_bias']}; the two are not from one training, copy "
                "the adapter again."
            )
        rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], module), config["r"])
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], module), config["lora_alpha"])
        if down.shape[:1] != (rank,):
            raise UserError(
                f"{down.path}: {down.name} is {list(down.shape)}, but {ADAPTER_CONFIG} has rank {rank}; the two are "
                "not from one training, copy the adapter again."
            )
        # rsLoRA: https://arxiv.org/abs/2312.03732
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        if is_embedding:
            # PEFT's embedding factors are A [r, rows] and B [columns, r]; the transposed product is added.
            up, down = down, up
        updates = {f"{module}.weight": Update(None, up, down, scale, is_embedding, magnitude)}
        if addition is not None:
            updates[f"{module}.bias"] = Update(scale=scale, addition=addition)
        return updates


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter's configuration, and check that every unsupported field has its default value."""
    path = folder / ADAPTER_CONFIG
    config = read_adapter_config(folder)
    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        is_known = name in _TRAINING_ONLY or name in _MERGED
        if not is_known and value and value != defaults.get(name):
            raise UserError(f"{path}: {name} {value!r} is not supported here; merge the adapter with PEFT.")
    if config["init_lora_weights"] not in _INITIALIZATIONS_WITHOUT_BASE_CHANGE:
        raise UserError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changed the base's weights at the start of the "
            "training; first convert the adapter to a plain LoRA with PEFT's path_initial_model_for_weight_conversion."
        )
    return config
