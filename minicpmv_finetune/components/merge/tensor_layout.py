"""The files of the merged checkpoint and the tensors in them, decided before a value is read.

Files, order and names are the base's, with two exceptions: embeddings that are one tensor in the base and were
trained separately become two tensors, and replicated layers are written out under their new numbers.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpmv_finetune.errors import UserError

from .names import TensorNames
from .update import Updates
from .weights import OutputFile, OutputTensor, WeightFile


@dataclass(frozen=True)
class TensorLayout:
    """The files to be written.

    Attributes:
        files: Files in the base's order.
        untied: Whether embeddings that are one tensor in the base are written as two.
        layers: For each layer of the merged model, the number of the base's layer; None without layer replication.
    """

    files: list[OutputFile]
    untied: bool
    layers: list[int] | None

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """All tensors of all files."""
        return (tensor for file in self.files for tensor in file.tensors)


def lay_out_tensors(base: Path, files: Sequence[WeightFile], names: TensorNames, updates: Updates) -> TensorLayout:
    """Decide which tensors are written to which file.

    Raises:
        UserError: An update matches no tensor, or a tensor of another shape.
    """
    present = set(names.modules.values())
    # Tied tensors are written separately if training has changed one of them but not the other.
    untied = {
        target: source
        for target, source in names.ties.items()
        if not updates.keeps_ties and {target, source} & set(updates.by_tensor)
    }
    layers = _replicated_layers(base, updates)
    output_files = []
    for file in files:
        tensors = []
        for stored in file.tensors:
            module = names.modules[stored.name]
            tensors += _copies(OutputTensor(stored.name, module, stored), names, layers)
            tensors += [
                OutputTensor(target, target, stored)
                for target, source in untied.items()
                if source == module and target not in present
            ]
        output_files.append(OutputFile(file.path.name, file.metadata, tensors))
    layout = TensorLayout(output_files, bool(untied), layers)
    _require_all_updates_used(layout, names, updates, base)
    return layout


def edit_config(folder: Path, layout: TensorLayout) -> None:
    """Change a copied config.json so that it describes the merged weights."""
    if not layout.untied and layout.layers is None:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = _language_config(config)
    if layout.untied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if layout.layers is not None:
        text["num_hidden_layers"] = len(layout.layers)
        if "layer_types" in text:
            text["layer_types"] = [text["layer_types"][number] for number in layout.layers]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _replicated_layers(base: Path, updates: Updates) -> list[int] | None:
    """The number of the base's layer for each layer of the merged model.

    Raises:
        UserError: The ranges exceed the model's layers, or the model mixes kinds of layers.
    """
    if not updates.layer_replication:
        return None
    config = _language_config(json.loads((base / "config.json").read_text()))
    count = config["num_hidden_layers"]
    if len(set(config.get("layer_types", ()))) > 1:
        raise UserError(
            f"{base}: layer_replication cannot be merged into a model that mixes kinds of layers in a fixed order; "
            "train without it."
        )
    layers = [number for start, end in updates.layer_replication for number in range(start, end)]
    if not layers or min(layers) < 0 or max(layers) >= count:
        raise UserError(
            f"{base}: layer_replication {[list(r) for r in updates.layer_replication]} does not fit its {count} "
            "layers; give the base that the adapter was trained on."
        )
    return layers


def _copies(tensor: OutputTensor, names: TensorNames, layers: list[int] | None) -> list[OutputTensor]:
    """The tensor, once for each number that its layer has in the merged model."""
    counter = re.compile(rf"^{re.escape(names.generation.language_model)}\.layers\.(\d+)\.")
    found = counter.match(tensor.module)
    if layers is None or found is None:
        return [tensor]
    marks = tensor.name.split(mark := f".layers.{found[1]}.")
    if len(marks) != 2:
        raise UserError(
            f"{tensor.source.path}: the name {tensor.name} does not contain exactly one layer number, so the layer "
            "cannot be replicated; train without layer_replication."
        )
    return [
        OutputTensor(
            marks[0] + mark.replace(found[1], str(number)) + marks[1],
            tensor.module[: found.start(1)] + str(number) + tensor.module[found.end(1) :],
            tensor.source,
        )
        for number, original in enumerate(layers)
        if original == int(found[1])
    ]


def _require_all_updates_used(layout: TensorLayout, names: TensorNames, updates: Updates, base: Path) -> None:
    tensors = {tensor.module: tensor for tensor in layout.tensors}
    for name, update in updates.by_tensor.items():
        if name not in tensors and updates.keeps_ties and names.ties.get(name) in tensors:
            continue  # the adapter contains the tied tensor twice
        if name not in tensors:
            raise UserError(
                f"{base}: the adapter changes {name}, but there is no such tensor; give the base that the adapter was "
                "trained on."
            )
        update.check(name, tensors[name].source)


def _language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the language model."""
    nested: dict[str, Any] = config.get("text_config", config)
    return nested
