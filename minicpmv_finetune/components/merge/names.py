"""The names of a checkpoint's tensors in the loaded model.

An adapter names the modules of the loaded model; a file may hold older names, which transformers maps while loading.
The model is built without memory for its weights, so the mapping costs no more than reading the headers. Building the
model also checks that the checkpoint is complete.
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
class TensorNames:
    """Names of a checkpoint's tensors.

    Attributes:
        generation: Generation of the checkpoint.
        modules: Name in the loaded model of each tensor, by its name in the file. A tensor that loading converts keeps
            the file's name, which no adapter tensor matches.
        ties: For tensors that are one in the loaded model: by name, the name of the tensor whose values are used.
    """

    generation: Generation
    modules: Mapping[str, str]
    ties: Mapping[str, str]


def read_tensor_names(checkpoint: Path, files: Sequence[WeightFile]) -> TensorNames:
    """Map a checkpoint's tensor names as transformers does while loading.

    Raises:
        UserError: The checkpoint is incomplete.
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
    return TensorNames(generation, modules, dict(getattr(model, "all_tied_weights_keys", {})))
