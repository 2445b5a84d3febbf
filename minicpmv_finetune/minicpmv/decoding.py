"""Greedy decoding of many prompts: rows leave as they finish, others enter, and shared beginnings run once.

A batch of fixed rows runs until its longest answer ends, at the end mostly on rows that have finished. Here a finished
row leaves at once with its keys and values, and when a quarter of the rows has left, the next prompts enter. Prompts
that begin in the same way, such as several questions about one image, run through the vision modules and the language
model once up to where they differ, and each goes on from a copy of the cache. Measured in docs/performance.md.

A row's tokens are at the right end of the cache without a gap: prompts enter with padding on the left, and the rests
that follow shared beginnings are processed in one call up to the end of the shortest one. Where a rest goes on, the
next steps process its tokens while other rows answer. So linear attention never meets padding after a token, which
would change its state. A call for each length of a rest took 10 to 24 % more time (four questions about an image, whose
rests have 7 to 10 tokens).
"""

import copy
from collections import defaultdict
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
        rests: Tokens of each row's prompt that are not in the cache yet.
        answers: Tokens generated so far, none before the rest has ended; the last one is not in the cache yet.
        lengths: Tokens of each row in the cache, at its right end; the columns before them are padding.
        positions: int [channels, rows, 1], position of each row's next token; one channel, or four with a canvas.
        cache: Keys, values and states of the language model.
    """

    numbers: list[int]
    rests: list[Sequence[int]]
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
    entered = 0
    rows: _Rows | None = None
    while entered < len(prompts) or rows:
        free = batch_size - (len(rows.numbers) if rows else 0)
        count = _count_entering(prompts[entered : entered + free + 1], free, batch_size)
        if rows is None or count:
            entering = {number: prompts[number] for number in range(entered, entered + count)}
            begun = _begin(model, encoder, entering, batch_size)
            rows = _join([rows, *begun] if rows else begun)
            entered += count
        else:
            _step(model, rows)
        left = []
        for row, (number, tokens) in enumerate(zip(rows.numbers, rows.answers, strict=True)):
            if tokens and (tokens[-1] in stop or len(tokens) == max_new_tokens):
                yield number, tokens
            else:
                left.append(row)
        if len(left) < len(rows.numbers):
            rows = _select(rows, left) if left else None


def _count_entering(following: Sequence[Prompt], free: int, batch_size: int) -> int:
    """Number of prompts that enter now: questions about one image at the same time, so that the image is encoded once.

    Args:
        following: The next prompts, one more than there are free rows.
        free: Number of free rows.
        batch_size: Number of all rows. Prompts enter when a quarter is free, and when half is free even if there are
            more about an image than fit.
    """
    count = min(free, len(following))
    names = [prompt.images for prompt in following]
    ends = (end for end in range(count, 0, -1) if end == len(names) or not names[end] or names[end] != names[end - 1])
    whole = next(ends, 0)
    if whole and 4 * free >= batch_size:
        return whole
    return count if 2 * free >= batch_size else 0


def _step(model: Any, rows: _Rows) -> None:
    """Process the next tokens of all rows: as many as each rest has, or one, of the rest or else of the answer."""
    count = max(1, min(len(rest) for rest in rows.rests))
    ids = torch.tensor([rest[:count] or answer[-1:] for rest, answer in zip(rows.rests, rows.answers, strict=True)])
    rows.lengths = [length + count for length in rows.lengths]
    rows.rests = [rest[count:] for rest in rows.rests]
    has_ended = [not rest for rest in rows.rests]
    places = rows.positions + torch.arange(count)
    tokens, rows.cache = _forward(model, ids, rows.lengths, places, rows.cache, has_ended)
    rows.positions = rows.positions + count
    for answer, token in zip(rows.answers, tokens, strict=True):
        answer += token


def _begin(model: Any, encoder: Encoder, prompts: Mapping[int, Prompt], batch_size: int) -> list[_Rows]:
    """Run what prompts begin with, once for all that have it in common, and most of what follows."""
    beginnings = _shared_beginnings(prompts, model.config.image_token_id)
    inputs = [ModelInput("", beginning.ids, [], beginning.slices) for beginning in beginnings]
    batch = collate(inputs, encoder.pad_token_id, encoder.slicing.patch_size, "left", encoder.slicing.resampler)
    del batch["attention_mask"]  # follows from the lengths
    lengths = [len(beginning.ids) for beginning in beginnings]
    positions = [_positions(model, encoder, beginning, prompts) for beginning in beginnings]
    places = _stack([channels[:, :-1] for channels in positions])
    has_ended = [len(beginning.numbers) == 1 for beginning in beginnings]
    first, cache = _forward(model, batch.pop("input_ids"), lengths, places, None, has_ended, **batch)

    of_prompt = {number: row for row, beginning in enumerate(beginnings) for number in beginning.numbers}
    rests = {number: prompt.ids[lengths[of_prompt[number]] :] for number, prompt in prompts.items()}
    parts = []
    for numbers in _group_by_length(rests, batch_size):
        chosen = [of_prompt[number] for number in numbers]
        part = _Rows(
            numbers,
            [rests[number] for number in numbers],
            [[*first[row]] for row in chosen],
            [lengths[row] for row in chosen],
            _stack([positions[row][:, -1:] for row in chosen]),
            _arrange([cache], max(lengths[row] for row in chosen), chosen),
        )
        if all(part.rests):
            _step(model, part)
        parts.append(part)
    return parts


def _group_by_length(rests: Mapping[int, Sequence[int]], batch_size: int) -> list[list[int]]:
    """Group prompts whose rests are about as long; a group is processed in one call up to the end of its shortest rest.

    What is left of the others goes through the steps in which other rows answer. A group has at most as many such
    tokens as a step has rows: they then take no longer than another call would.
    """
    groups: list[list[int]] = []
    left = 0
    for number in sorted(rests, key=lambda number: len(rests[number])):
        left += len(rests[number]) - len(rests[groups[-1][0]]) if groups else 0
        if not groups or left > batch_size:
            groups.append([])
            left = 0
        groups[-1].append(number)
    return groups


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


def _positions(model: Any, encoder: Encoder, beginning: _Beginning, prompts: Mapping[int, Prompt]) -> torch.Tensor:
    """The positions of a beginning's tokens and of the one after them, as the model's own `generate` computes them.

    Returns:
        int [channels, tokens + 1]; from the last one on, behind all images, positions rise by one in each channel.
    """
    side = encoder.slicing.patch_size
    ids = torch.tensor([prompts[beginning.numbers[0]].ids])
    inputs = {"attention_mask": torch.ones_like(ids)}
    if beginning.slices:
        sizes = [[pixels.shape[0] // side, pixels.shape[1] // side] for pixels in beginning.slices]
        inputs["target_sizes"] = torch.tensor(sizes, dtype=torch.int32)
    positions = model._prepare_position_ids_for_generation(ids, inputs).view(-1, ids.shape[1])
    return torch.cat([positions, positions[:, -1:] + 1], dim=1)[:, : len(beginning.ids) + 1]


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
    has_ended: Sequence[bool],
    **images: torch.Tensor,
) -> tuple[list[list[int]], Cache]:
    """Run tokens after those in the cache; returns each row's most likely next token, and the cache with these tokens.

    Args:
        model: Model in evaluation mode.
        ids: int [rows, tokens].
        lengths: Tokens of each row, those in the cache included.
        positions: int [channels, rows, tokens].
        cache: Cache of the same rows; None at their first tokens.
        has_ended: Whether a row's prompt has ended, so that its next token is needed; none is computed for the others.
        **images: Pixels and sizes of the slices, at the first tokens.
    """
    columns = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
    mask = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
    needed = F.pad(torch.tensor(has_ended)[:, None], (ids.shape[1] - 1, 0))  # only the last token of some rows
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        position_ids=(positions[0] if len(positions) == 1 else positions).to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=needed.to(model.device),
        **{name: tensor.to(model.device) for name, tensor in images.items()},
    )
    # On a CPU, `max` takes a third of the time of `argmax`: 1.2 instead of 3.7 ms for 16 rows of 150,000 logits.
    most_likely = iter(output.logits.max(dim=-1).indices.tolist())
    return [[next(most_likely)] if ended else [] for ended in has_ended], output.past_key_values


def _select(rows: _Rows, chosen: Sequence[int]) -> _Rows:
    lengths = [rows.lengths[row] for row in chosen]
    return _Rows(
        [rows.numbers[row] for row in chosen],
        [rows.rests[row] for row in chosen],
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
        [rest for part in parts for rest in part.rests],
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
