"""Several samples packed into one row, so that no computation is spent on padding; no sample sees another.

Operations on single tokens (embeddings, projections, feed-forward layers, norms, the head) take the packed row as it
is and compute real tokens alone. Operations between tokens (attention, linear attention) get the samples unpacked: one
sample in each row, padded at the end. Causal attention never looks at what follows, so the padding changes no result.
Therefore no mask has to separate the samples, and no mask can be wrong. The cost of attention is the square of each
sample's length; a block-diagonal mask over the packed row would cost the square of the row's length. On a GPU, in half
precision, torch's own kernels for samples of various lengths take the packed row itself, and so does flash attention.

Samples that begin with the same tokens, such as several questions about one image, may share them: the row has these
tokens once, in the first of the samples, and operations on single tokens compute them once. Unpacking puts them into
the row of every sample that shares them, so that each sample sees them and itself only, in all layers.

A model receives the boundaries of the samples by the arguments that transformers uses for this: `cu_seq_lens_q` and
`max_length_q` (and the same for `k`). Where each token is follows from them; `packing_arguments` computes it once for a
batch, on the CPU, and passes it to the layers beside them.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

PACKED_ATTENTION = "sdpa_packed"
"""Name under which the attention below is registered in transformers."""

PACKING_ARGUMENTS = (
    *(f"{name}_{side}" for name in ("cu_seq_lens", "max_length") for side in "qk"),
    "packed_sample_ids",
    "packed_offsets",
    "packed_shared",
    "packed_places",
    *(f"packed_{name}" for name in ("part_ids", "part_offsets", "part_sizes", "begun", "continued", "origin")),
)
"""Names of the arguments that describe a packed row, without the positions."""

_WIDEST_HEAD = 256  # of torch's kernels for samples of various lengths
_OLDEST_CARD = (8, 0)  # with these kernels, by its compute capability: Ampere


@dataclass(frozen=True)
class PackedSamples:
    """The samples of a packed row: which sample each token belongs to, and where in the sample it is.

    Attributes:
        sample_ids: int [tokens], number of the sample that the token belongs to.
        offsets: int [tokens], position of the token within its sample.
        count: Number of samples in the row.
        longest: Number of tokens of the longest sample.
        shared: int [samples], number of first tokens that the sample shares with the one before it, whose row they are
            in; 0 if it shares none. None if no sample does.
        places: int [samples, longest], where in the row each token of the unpacked rows is, and the number of tokens of
            the row on padding; None if no sample shares tokens.
    """

    sample_ids: torch.Tensor
    offsets: torch.Tensor
    count: int
    longest: int
    shared: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, longest: int) -> "PackedSamples":
        """Build from the cumulative lengths of the samples, int [samples + 1], beginning with 0."""
        cu_seqlens = cu_seqlens.long()
        sample_ids = torch.repeat_interleave(cu_seqlens.diff())
        offsets = torch.arange(len(sample_ids), device=cu_seqlens.device) - cu_seqlens[sample_ids]
        return cls(sample_ids, offsets, len(cu_seqlens) - 1, longest)

    @property
    def attention_mask(self) -> torch.Tensor:
        """Mask of the unpacked rows, bool [samples, longest]: true on tokens, false on padding."""
        if self.places is not None:
            return self.places < len(self.sample_ids)
        mask = torch.zeros(self.count, self.longest, dtype=torch.bool, device=self.sample_ids.device)
        return mask.index_put((self.sample_ids, self.offsets), mask.new_ones(()))

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """From [1, tokens, …] to [samples, longest, …], with zeros as padding at the end of each row."""
        if self.places is not None:
            padded = torch.cat([packed.squeeze(0), packed.new_zeros(1, *packed.shape[2:])])
            return padded.index_select(0, self.places.flatten()).unflatten(0, self.places.shape)
        rows = packed.new_zeros(self.count, self.longest, *packed.shape[2:])
        return rows.index_put((self.sample_ids, self.offsets), packed.squeeze(0))

    def before(self, distance: int) -> torch.Tensor:
        """Where in the row the token so many places before each token in its sample is; the row's length if nowhere."""
        if self.places is None:
            place = torch.arange(len(self.offsets), device=self.offsets.device) - distance
        else:
            place = self.places[self.sample_ids, (self.offsets - distance).clamp(min=0)]
        return place.where(self.offsets >= distance, len(self.offsets))

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """From [samples, longest, …] to [1, tokens, …], without the padding."""
        return rows[self.sample_ids, self.offsets].unsqueeze(0)


@dataclass(frozen=True)
class SharedStates:
    """A packed row in two parts: what begins by itself, and what continues from tokens that samples share.

    Attributes:
        rows: The samples of the two parts: what samples share and the samples that share nothing; and the rest of each
            sample that shares something.
        tokens: The row's tokens that belong to each part, int.
        origin: int [continuations], number of the beginning from which each continues.
    """

    rows: tuple[PackedSamples, PackedSamples]
    tokens: tuple[torch.Tensor, torch.Tensor]
    origin: torch.Tensor


def packing_arguments(lengths: Sequence[int], shared: Sequence[int] = ()) -> dict[str, Any]:
    """Return the arguments by which a model receives the boundaries of a row's samples.

    Args:
        lengths: Number of tokens of each sample.
        shared: Number of first tokens that each sample shares with the one before it, so that the row does not have
            them again; by default none.

    Returns:
        `position_ids` int [1, tokens], which begin at 0 in each sample, and behind shared tokens continue after them;
        `cu_seq_lens_q` and `cu_seq_lens_k` int32 [samples + 1]; `max_length_q` and `max_length_k`; and for each token
        `packed_sample_ids` and `packed_offsets`, int [tokens], the attributes of `PackedSamples`. If samples share
        tokens, the boundaries are those of the samples with all their tokens, `packed_shared` and `packed_places` are
        two more of those attributes, and further arguments describe the row's `SharedStates`.
    """
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    samples = PackedSamples.from_cu_seqlens(cu_seqlens, max(lengths))
    if any(shared):
        samples = _without_repetitions(samples, torch.tensor(shared))
    return {
        **({"packed_shared": samples.shared, "packed_places": samples.places} if any(shared) else {}),
        **(_parts_of(samples, samples.shared) if samples.shared is not None else {}),
        "position_ids": samples.offsets.unsqueeze(0),
        **{f"cu_seq_lens_{side}": cu_seqlens for side in "qk"},
        **{f"max_length_{side}": max(lengths) for side in "qk"},
        "packed_sample_ids": samples.sample_ids,
        "packed_offsets": samples.offsets,
    }


def _without_repetitions(samples: PackedSamples, shared: torch.Tensor) -> PackedSamples:
    """The samples of a row that has the tokens that a sample shares with the one before it only once."""
    is_own = samples.offsets >= shared[samples.sample_ids]
    sample_ids, offsets = samples.sample_ids[is_own], samples.offsets[is_own]
    places = torch.full((samples.count, samples.longest), len(sample_ids))
    places[sample_ids, offsets] = torch.arange(len(sample_ids))
    for number, count in enumerate(shared.tolist()):
        places[number, :count] = places[number - 1, :count]
    return PackedSamples(sample_ids, offsets, samples.count, samples.longest, shared, places)


def packed_samples(arguments: dict[str, Any]) -> PackedSamples | None:
    """Read the samples of a packed row from a model's arguments; None if the rows are not packed."""
    cu_seqlens = arguments.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return None
    longest, sample_ids = int(arguments["max_length_q"]), arguments.get("packed_sample_ids")
    if sample_ids is None:
        return PackedSamples.from_cu_seqlens(cu_seqlens, longest)
    shared, places = (arguments.get(f"packed_{name}") for name in ("shared", "places"))
    return PackedSamples(sample_ids, arguments["packed_offsets"], len(cu_seqlens) - 1, longest, shared, places)


def _parts_of(samples: PackedSamples, shared: torch.Tensor) -> dict[str, Any]:
    """The arguments from which `shared_states` makes the two parts of a row, without a number to wait for on a GPU."""
    numbers = torch.arange(samples.count)
    first = torch.where(shared == 0, numbers, 0).cummax(0).values
    # The first of the samples that share tokens has them in its own row, and continues from them like the others.
    shared_by_all = torch.zeros_like(shared).scatter_reduce(0, first, shared, "amax")[first]
    shares, of_token = shared_by_all > 0, shared_by_all[samples.sample_ids]
    is_continued = (of_token > 0) & (samples.offsets >= of_token)
    beginning, continuation = (shared == 0).cumsum(0) - 1, shares.cumsum(0) - 1
    ids = torch.where(is_continued, continuation[samples.sample_ids], beginning[samples.sample_ids])
    offsets = samples.offsets - torch.where(is_continued, of_token, 0)
    begun, continued = (~is_continued).nonzero().squeeze(1), is_continued.nonzero().squeeze(1)
    return {
        "packed_part_ids": ids,
        "packed_part_offsets": offsets,
        "packed_part_sizes": [int(of[part].max()) + 1 for part in (begun, continued) for of in (ids, offsets)],
        "packed_begun": begun,
        "packed_continued": continued,
        "packed_origin": beginning[first][shares],
    }


def shared_states(arguments: dict[str, Any]) -> SharedStates | None:
    """Read the two parts of a packed row from a model's arguments; None if no sample shares tokens."""
    if (begun := arguments.get("packed_begun")) is None:
        return None
    ids, offsets, sizes, continued, origin = (
        arguments[f"packed_{name}"] for name in ("part_ids", "part_offsets", "part_sizes", "continued", "origin")
    )
    beginnings = PackedSamples(ids[begun], offsets[begun], *sizes[:2])
    continuations = PackedSamples(ids[continued], offsets[continued], *sizes[2:])
    return SharedStates((beginnings, continuations), (begun, continued), origin)


def enable_packing(model: PreTrainedModel, language_model: str) -> None:
    """Make a model's language model accept packed rows; rows that are not packed are computed as before.

    The layers of linear attention accept packed rows already (see `linear_attention`). This function replaces the
    softmax attention of the other layers, unless flash attention is used, which accepts packed rows itself.

    Args:
        model: Any supported model.
        language_model: Module path of the language model within the model.
    """
    part: Any = model.get_submodule(language_model)
    if not is_flash_attention_requested(part.config):
        part.set_attn_implementation(PACKED_ATTENTION)


def _packed_sdpa_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute SDPA of [batch, heads, length, width]; each sample of a packed row by itself."""
    samples = packed_samples(options)
    if samples is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    takes_row = samples.places is None and query.is_cuda and not options.get("dropout")
    if takes_row and _has_kernel(query.device, dtype, query.shape[-1]):
        query, key, value = (part.to(dtype) for part in (query, key, value))
        return _attend_by_kernel(query, key, value, samples, options), None
    query, key, value = (samples.unpack(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value))
    # The padding follows the sample's tokens, so causal attention hides it without a mask.
    output, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    return samples.pack(output), None


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether torch has a kernel for samples of various lengths on a GPU; its first versions had another signature."""
    fits = dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= _WIDEST_HEAD
    return fits and _varlen_attention() is not None and torch.cuda.get_device_capability(device) >= _OLDEST_CARD


@cache
def _varlen_attention() -> Callable[..., Any] | None:
    """Return torch's attention for samples of various lengths, or None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None


def _attend_by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, samples: PackedSamples, options: dict[str, Any]
) -> torch.Tensor:
    """Compute causal attention of [1, heads, tokens, width] by torch's kernel; returns [1, tokens, heads, width]."""
    attend: Any = _varlen_attention()
    # The same tensor on both sides, as one of the kernels requires for causal attention.
    borders = (options["cu_seq_lens_q"],) * 2
    states = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    longest = (samples.longest,) * 2
    is_grouped = key.shape[1] != query.shape[1]
    output: torch.Tensor = attend(
        *states, *borders, *longest, scale=options.get("scaling"), window_size=(-1, 0), enable_gqa=is_grouped
    )
    return output.unsqueeze(0)


def _packed_sdpa_mask(*sizes: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    make_mask: Any = sdpa_mask
    return None if attention_mask is None else make_mask(*sizes, attention_mask=attention_mask, **options)


AttentionInterface.register(PACKED_ATTENTION, _packed_sdpa_forward)
AttentionMaskInterface.register(PACKED_ATTENTION, _packed_sdpa_mask)
