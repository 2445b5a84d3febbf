"""Which tensors the merged checkpoint's files hold, decided before a value is read.

Files, order and names are the base's, with two exceptions: embeddings that were one tensor in the base and were
trained apart become two, and replicated layers are written out under their new numbers.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpmv_finetune.errors import UserError

from .names import Names
from .update import Updates
from .weights import Planned, PlannedFile, WeightFile


@dataclass(frozen=True)
class Plan:
    """The files to be written.

    Attributes:
        files: in the base's order.
        untied: whether embeddings that are one tensor in the base are written as two.
        layers: number of the base's layer for each of the merged model's; None without layer replication.
    """

    files: list[PlannedFile]
    untied: bool
    layers: list[int] | None

    @property
    def tensors(self) -> Iterator[Planned]:
        """All tensors of all files."""
        return (tensor for file in self.files for tensor in file.tensors)


def make_plan(base: Path, files: Sequence[WeightFile], names: Names, updates: Updates) -> Plan:
    """Decide what is written.

    Raises:
        UserError: a change finds no tensor, or one of another shape.
    """
    present = set(names.modules.values())
    # A tied tensor is written apart once training has parted it from its twin.
    parted = {
        target: source
        for target, source in names.ties.items()
        if not updates.keeps_ties and {target, source} & set(updates.by_tensor)
    }
    layers = _replicated(base, updates)
    planned_files = []
    for file in files:
        tensors = []
        for stored in file.tensors:
            module = names.modules[stored.name]
            tensors += _copies(Planned(stored.name, module, stored), names, layers)
            tensors += [
                Planned(target, target, stored)
                for target, source in parted.items()
                if source == module and target not in present
            ]
        planned_files.append(PlannedFile(file.path.name, file.metadata, tensors))
    plan = Plan(planned_files, bool(parted), layers)
    _check_all_used(plan, names, updates, base)
    return plan


def edit_config(folder: Path, plan: Plan) -> None:
    """Make a copied config.json say what the merged weights are."""
    if not plan.untied and plan.layers is None:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = _language_config(config)
    if plan.untied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if plan.layers is not None:
        text["num_hidden_layers"] = len(plan.layers)
        if "layer_types" in text:
            text["layer_types"] = [text["layer_types"][number] for number in plan.layers]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _replicated(base: Path, updates: Updates) -> list[int] | None:
    """The base's layer behind each of the merged model's.

    Raises:
        UserError: the ranges leave the model, or it mixes kinds of layers.
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
            "layers; give the base the adapter was trained on."
        )
    return layers


def _copies(tensor: Planned, names: Names, layers: list[int] | None) -> list[Planned]:
    """A tensor under each number its layer has in the merged model."""
    counter = re.compile(rf"^{re.escape(names.generation.language_model)}\.layers\.(\d+)\.")
    found = counter.match(tensor.module)
    if layers is None or found is None:
        return [tensor]
    marks = tensor.name.split(mark := f".layers.{found[1]}.")
    if len(marks) != 2:
        raise UserError(f"{tensor.source.path}: {tensor.name} has no layer number that could be replicated.")
    return [
        Planned(
            marks[0] + mark.replace(found[1], str(number)) + marks[1],
            tensor.module[: found.start(1)] + str(number) + tensor.module[found.end(1) :],
            tensor.source,
        )
        for number, original in enumerate(layers)
        if original == int(found[1])
    ]


def _check_all_used(plan: Plan, names: Names, updates: Updates, base: Path) -> None:
    planned = {tensor.module: tensor for tensor in plan.tensors}
    for name, update in updates.by_tensor.items():
        if name not in planned and updates.keeps_ties and names.ties.get(name) in planned:
            continue  # saved twice, but one tensor
        if name not in planned:
            raise UserError(
                f"The adapter changes {name}, but {base} has no such tensor; give the base the adapter was trained on."
            )
        update.check(name, planned[name].source)


def _language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the language model."""
    nested: dict[str, Any] = config.get("text_config", config)
    return nested
