"""Which part of a model a tensor belongs to, and which layers get adapters, by the tensors' names alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from minicpmv_finetune.errors import UserError
from minicpmv_finetune.minicpmv.generations import PUBLISHED_LORA_TARGETS, Generation


@dataclass(frozen=True)
class Targets:
    """Which layers get adapters.

    Attributes:
        pattern: Regular expression of their names; empty means the published default.
        parts: Names of the parts in `--lora_targets`, where the expression chooses among the layers of `llm`; without
            names it chooses alone.
        numbers: The layers' numbers, if not all that the expression matches.
        numbered: Name of the list of layers that the numbers refer to.
        replication: Ranges of the language model's layers that are stacked, as `--lora_layer_replication` names them.
    """

    pattern: str = ""
    parts: frozenset[str] = frozenset()
    numbers: frozenset[int] | None = None
    numbered: str = "layers"
    replication: str = ""

    def chooses(self, layer: str, generation: Generation) -> bool:
        """Whether a linear layer gets an adapter."""
        part = {"vision": "vision", "merger": "resampler"}.get(part_of(layer, generation))
        if part in self.parts:
            return True
        patterns = generation.target_patterns(self.pattern or PUBLISHED_LORA_TARGETS)
        if (self.parts and "llm" not in self.parts) or not any(re.fullmatch(pattern, layer) for pattern in patterns):
            return False
        number = re.search(rf"\.{re.escape(self.numbered)}\.(\d+)\.", layer)
        return self.numbers is None or (number is not None and int(number[1]) in self.numbers)


PUBLISHED_TARGETS = Targets()


def layer_ranges(text: str | None, layers: int) -> list[tuple[int, int]]:
    """The ranges of layers that `--lora_layer_replication` stacks, parsed from text such as `0:4,2:6`.

    Raises:
        UserError: These are no ranges of the model's layers.
    """
    if not text:
        return []
    pairs = [re.fullmatch(r"\s*(\d+):(\d+)\s*", part) for part in text.split(",")]
    ranges = [(int(pair[1]), int(pair[2])) for pair in pairs if pair]
    if len(ranges) != len(pairs) or not all(start < end <= layers for start, end in ranges):
        raise UserError(
            f"--lora_layer_replication {text}: give ranges of the {layers} layers as FIRST:END, where END is one past "
            f"the last, such as 0:{layers},{layers // 2}:{layers}."
        )
    return ranges


def stacked_layers(ranges: Sequence[tuple[int, int]]) -> list[int]:
    """The numbers of the layers that ranges stack, in their order."""
    return [number for start, end in ranges for number in range(start, end)]


def stacked_names(name: str, ranges: Sequence[tuple[int, int]], generation: Generation) -> list[str]:
    """The names of a module after its layer was replicated: PEFT numbers the stacked layers from 0, and adapts each."""
    layers = re.escape(f"{generation.language_model}.layers")
    found = re.fullmatch(rf"({layers})\.(\d+)((?:\..*)?)", name)
    if not ranges or not found:
        return [name]
    return [
        f"{found[1]}.{place}{found[3]}"
        for place, number in enumerate(stacked_layers(ranges))
        if number == int(found[2])
    ]


def linear_layer(name: str, shape: Sequence[int]) -> str:
    """The linear layer whose weight a tensor is; empty if it is another tensor."""
    is_embedding = name.endswith(("embed_tokens.weight", "embedding.weight"))
    return name.removesuffix(".weight") if name.endswith(".weight") and len(shape) == 2 and not is_embedding else ""


def part_of(name: str, generation: Generation) -> str:
    """The part of the model that a tensor belongs to."""
    prefixes = {
        "embeddings": generation.embed_tokens,
        "vision": generation.vision_tower,
        "merger": generation.merger,
        "language": generation.language_model,
    }
    return next((part for part, prefix in prefixes.items() if name.startswith(f"{prefix}.")), "head")
