"""What the tensors in a checkpoint's files are called in the loaded model.

An adapter names the modules of the loaded model; a file may hold older names, which transformers maps while loading.
The model is built without memory for its weights, so this costs no more than reading the headers, and checks on the
way that the checkpoint is whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.minicpmv.generations import Generation

from .weights import WeightFile


@dataclass(frozen=True)
class Names:
    """Names of a checkpoint's tensors.

    Attributes:
        generation: of the checkpoint.
        modules: by the name in the file, the one in the loaded model. A tensor that loading computes with keeps the
            file's name, under which no adapter tensor will find it.
        ties: of tensors that are one in the loaded model, by name the one whose values count.
    """

    generation: Generation
    modules: Mapping[str, str]
    ties: Mapping[str, str]


def read_names(checkpoint: Path, files: Sequence[WeightFile]) -> Names:
    """Ask transformers how it would name a checkpoint's tensors.

    Raises:
        UserError: the checkpoint is not whole.
    """
    model, generation = load_model(checkpoint, device_map="meta")
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()
    modules = {}
    for tensor in (tensor for file in files for tensor in file.tensors):
        renamed, converted = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, known)
        modules[tensor.name] = tensor.name if converted else renamed
    return Names(generation, modules, dict(getattr(model, "all_tied_weights_keys", {})))
