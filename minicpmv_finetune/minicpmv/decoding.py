"""Greedy decoding of many prompts: rows leave as they finish, others enter, and shared beginnings run once.

A batch of fixed rows runs until its longest answer ends, at the end mostly on rows that have finished. Here a finished
row leaves at once with its keys and values, and when half of the rows have left, the next prompts enter. Prompts that
begin in the same way, such as several questions about one image, run through the vision modules and the language model
once up to where they differ, and each goes on from a copy of the cache. Measured in docs/performance.md.

A row's tokens are at the right end of the cache without a gap: prompts enter with padding on the left, and what follows
a shared beginning is processed in groups of one length. So linear attention never meets padding after a token, which
would change its state.
"""

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from .batch import collate
from .conversation import Encoder
from .model_input import ModelInput

_WORTH_SHARING = 16  # tokens; after a shorter beginning the separate calls for the rests cost more than it saves


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    Attributes:
        ids: Token ids.
        images: Names of its images' contents, in the order of their tokens; equal names mean equal slices.
        cut_images: Returns the slices of the images, uint8 [height, width, 3] each; called when the prompt enters.
    """

    ids: Sequence[int]
    images: tuple[str, ...]
    cut_images: Callable[[], list[NDArray[np.uint8]]]


@dataclass(frozen=True)
class _Beginning:
    """What some prompts have in common: their first tokens and all their images."""

    numbers: list[int]
    ids: Sequence[int]
    slices: list[NDArray[np.uint8]]


@dataclass
class _Rows:
    """Prompts that are answered at the same time.

    Attributes:
        numbers: Place of each row's prompt among all prompts.
        answers: Tokens generated so far; the last one is not in the cache yet.
        lengths: Tokens of each row in the cache, at its right end; the columns before them are padding.
        positions: int [channels, rows, 1], position of each row's next token; one channel, or four with a canvas.
        cache: Keys, values and states of the language model.
    """

    numbers: list[int]
    answers: list[list[int]]
    lengths: list[int]
    positions: torch.Tensor
    cache: Cache


@torch.inference_mode()
def decode_greedily(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    stop: frozenset[int],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """Generate the most likely token of each step until a stop token.

    Args:
        model: Model in evaluation mode, without PEFT's wrapper.
        encoder: Encoder of the model's checkpoint.
        prompts: Prompts in the order in which they enter.
        stop: Tokens that end an answer; such a token is the last one of its answer.
        max_new_tokens: Largest number of tokens of an answer.
        batch_size: Largest number of prompts that are answered at the same time.

    Yields:
        Place and tokens of an answer, in the order in which the answers end.
    """
    waiting = deque(range(len(prompts)))
    rows: _Rows | None = None
    while waiting or rows:
        free = batch_size - (len(rows.numbers) if rows else 0)
        if rows is None or (waiting and 2 * free >= batch_size):
            entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            begun = _begin(model, encoder, {number: prompts[number] for number in entering})
            rows = _join([rows, *begun] if rows else begun)
        else:
            _step(model, rows)
        left = []
        for row, (number, tokens) in enumerate(zip(rows.numbers, rows.answers, strict=True)):
            if tokens[-1] in stop or len(tokens) == max_new_tokens:
                yield number, tokens
            else:
                left.append(row)
        if len(left) < len(rows.numbers):
            rows = _select(rows, left) if left else None


def _step(model: Any, rows: _Rows) -> None:
    """Generate one token of each row."""
    last = torch.tensor([[answer[-1]] for answer in rows.answers])
    rows.lengths = [length + 1 for length in rows.lengths]
    tokens, rows.cache = _forward(model, last, rows.lengths, rows.positions, rows.cache)
    rows.positions = rows.positions + 1
    for answer, token in zip(rows.answers, tokens, strict=True):
        answer.append(token)


def _begin(model: Any, encoder: Encoder, prompts: Mapping[int, Prompt]) -> list[_Rows]:
    """Run prompts up to the first token of their answers; what several begin with runs once."""
    beginnings = _shared_beginnings(prompts, model.config.image_token_id)
    positions: dict[int, torch.Tensor] = {}
    for beginning in beginnings:
        positions |= _positions(model, encoder, beginning, prompts)
    inputs = [ModelInput("", beginning.ids, [], beginning.slices) for beginning in beginnings]
    batch = collate(inputs, encoder.pad_token_id, encoder.slicing.patch_size, "left", encoder.slicing.resampler)
    del batch["attention_mask"]  # follows from the lengths
    lengths = [len(beginning.ids) for beginning in beginnings]
    places = _stack([positions[beginning.numbers[0]][:, : len(beginning.ids)] for beginning in beginnings])
    first, cache = _forward(model, batch.pop("input_ids"), lengths, places, None, **batch)

    of_prompt = {number: row for row, beginning in enumerate(beginnings) for number in beginning.numbers}
    by_rest: dict[int, list[int]] = defaultdict(list)
    for number, prompt in prompts.items():
        by_rest[len(prompt.ids) - lengths[of_prompt[number]]].append(number)
    rows = []
    for rest, numbers in by_rest.items():
        chosen = [of_prompt[number] for number in numbers]
        tokens = [first[row] for row in chosen]
        own_cache = _arrange([cache], max(lengths[row] for row in chosen), chosen)
        whole = [len(prompts[number].ids) for number in numbers]
        if rest:
            ids = torch.tensor([prompts[number].ids[-rest:] for number in numbers])
            places = _stack([positions[number][:, -rest:] for number in numbers])
            tokens, own_cache = _forward(model, ids, whole, places, own_cache)
        after = _stack([positions[number][:, -1:] for number in numbers]) + 1
        rows.append(_Rows(numbers, [[token] for token in tokens], whole, after, own_cache))
    return rows


def _shared_beginnings(prompts: Mapping[int, Prompt], image_token: int) -> list[_Beginning]:
    """Group the prompts with equal images and equal first tokens; a prompt that shares nothing is its own beginning."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, prompt in prompts.items():
        groups[prompt.images].append(number)
    beginnings = []
    for numbers in groups.values():
        several = [prompts[number].ids for number in numbers]
        # At least one token is left to each prompt, since its result is the first token of the answer.
        common = _common_length(several) if len(several) > 1 else 0
        has_all_images = image_token not in several[0][common:]
        if common >= _WORTH_SHARING and has_all_images:
            beginnings.append(_Beginning(numbers, several[0][:common], prompts[numbers[0]].cut_images()))
        else:
            beginnings += [
                _Beginning([number], prompts[number].ids, prompts[number].cut_images()) for number in numbers
            ]
    return beginnings


def _common_length(several: Sequence[Sequence[int]]) -> int:
    """Number of first tokens that all sequences have in common, without the last token of the shortest one."""
    first = several[0]
    shortest = min(len(ids) for ids in several) - 1
    return next(
        (place for place in range(shortest) if any(ids[place] != first[place] for ids in several)),
        shortest,
    )


def _positions(
    model: Any, encoder: Encoder, beginning: _Beginning, prompts: Mapping[int, Prompt]
) -> dict[int, torch.Tensor]:
    """The positions of each prompt's tokens as the model's own `generate` computes them, int [channels, tokens]."""
    side = encoder.slicing.patch_size
    sizes = [[pixels.shape[0] // side, pixels.shape[1] // side] for pixels in beginning.slices]
    found = {}
    for number in beginning.numbers:
        ids = torch.tensor([prompts[number].ids])
        inputs = {"attention_mask": torch.ones_like(ids)}
        if sizes:
            inputs["target_sizes"] = torch.tensor(sizes, dtype=torch.int32)
        positions = model._prepare_position_ids_for_generation(ids, inputs)
        found[number] = positions.view(-1, ids.shape[1])
    return found


def _stack(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack positions, each [channels, tokens], to [channels, rows, tokens] with zeros on the left."""
    channels, longest = max(len(row) for row in rows), max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row.expand(channels, -1), (longest - row.shape[1], 0)) for row in rows], dim=1)


def _forward(
    model: Any,
    ids: torch.Tensor,
    lengths: Sequence[int],
    positions: torch.Tensor,
    cache: Cache | None,
    **images: torch.Tensor,
) -> tuple[list[int], Cache]:
    """Run tokens after those in the cache; returns each row's most likely next token, and the cache with these tokens.

    Args:
        model: Model in evaluation mode.
        ids: int [rows, tokens].
        lengths: Tokens of each row, those in the cache included.
        positions: int [channels, rows, tokens].
        cache: Cache of the same rows; None at their first tokens.
        **images: Pixels and sizes of the slices, at the first tokens.
    """
    columns = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
    mask = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        position_ids=(positions[0] if len(positions) == 1 else positions).to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **{name: tensor.to(model.device) for name, tensor in images.items()},
    )
    most_likely: list[int] = output.logits[:, -1].argmax(dim=-1).tolist()
    return most_likely, output.past_key_values


def _select(rows: _Rows, chosen: Sequence[int]) -> _Rows:
    lengths = [rows.lengths[row] for row in chosen]
    return _Rows(
        [rows.numbers[row] for row in chosen],
        [rows.answers[row] for row in chosen],
        lengths,
        rows.positions[:, list(chosen)],
        _arrange([rows.cache], max(lengths), chosen),
    )


def _join(parts: Sequence[_Rows]) -> _Rows:
    if len(parts) == 1:
        return parts[0]
    lengths = [length for part in parts for length in part.lengths]
    channels = max(len(part.positions) for part in parts)
    return _Rows(
        [number for part in parts for number in part.numbers],
        [answer for part in parts for answer in part.answers],
        lengths,
        torch.cat([part.positions.expand(channels, -1, -1) for part in parts], dim=1),
        _arrange([part.cache for part in parts], max(lengths)),
    )


def _arrange(caches: Sequence[Cache], columns: int, chosen: Sequence[int] | None = None) -> Cache:
    """Put the rows of caches together, with padding or less of it on the left.

    Args:
        caches: Caches of one model; they stay as they are.
        columns: Tokens and padding of the result.
        chosen: Rows of the result, which may repeat, by their place in all caches; None for all.
    """

    def take(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        return rows if chosen is None else rows.index_select(0, torch.tensor(chosen, device=rows.device))

    def take_columns(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return take([F.pad(tensor, (0, 0, columns - tensor.shape[2], 0)) for tensor in tensors])

    arranged = copy.copy(caches[0])
    arranged.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer: Any = copy.copy(layers[0])
        if type(layer) is LinearAttentionLayer:
            for name in ("conv_states", "recurrent_states"):
                states = [getattr(other, name) for other in layers]
                setattr(layer, name, {key: take([state[key] for state in states]) for key in states[0]})
        elif type(layer) is DynamicLayer:
            layer.keys = take_columns([other.keys for other in layers])
            layer.values = take_columns([other.values for other in layers])
        else:
            raise TypeError(f"{type(layer).__name__}: rows of this kind of cache cannot leave and enter.")
        arranged.layers.append(layer)
    return arranged
