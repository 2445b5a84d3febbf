"""Several samples in one row, none of which sees another.

A packed row has no padding: what works token by token (embeddings, projections, feed-forward layers, norms, the
head) computes real tokens alone. What looks from token to token gets the samples apart: laid out one a row, padded at
the end, where nothing looks back from. So no mask has to say who belongs to whom, none can be wrong, and attention
costs the square of a sample's length; a block-diagonal mask over the pack would cost that of the pack's.
Flash attention takes the packed row as it is, by the same arguments.

A model is told of the samples as transformers has it: `cu_seq_lens_q` and `max_length_q` (and the same for `k`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

APART = "sdpa_apart"
"""Name of the attention below among transformers' own."""


@dataclass(frozen=True)
class Samples:
    """Where each token of a packed row belongs.

    Attributes:
        number: int [tokens], of its sample.
        offset: int [tokens], within its sample.
        count: of the samples.
        longest: tokens of the longest.
    """

    number: torch.Tensor
    offset: torch.Tensor
    count: int
    longest: int

    @classmethod
    def of(cls, boundaries: torch.Tensor, longest: int) -> "Samples":
        """From where the samples start, and where the last one ends: int [samples + 1]."""
        starts = boundaries.long()
        number = torch.repeat_interleave(starts.diff())
        return cls(number, torch.arange(len(number), device=starts.device) - starts[number], len(starts) - 1, longest)

    @property
    def present(self) -> torch.Tensor:
        """Bool [samples, longest]: whether there is a token."""
        there = torch.zeros(self.count, self.longest, dtype=torch.bool, device=self.number.device)
        return there.index_put((self.number, self.offset), there.new_ones(()))

    def apart(self, packed: torch.Tensor) -> torch.Tensor:
        """From [1, tokens, …] to [samples, longest, …], zero behind each."""
        rows = packed.new_zeros(self.count, self.longest, *packed.shape[2:])
        return rows.index_put((self.number, self.offset), packed[0])

    def together(self, rows: torch.Tensor) -> torch.Tensor:
        """From [samples, longest, …] to [1, tokens, …]."""
        return rows[self.number, self.offset].unsqueeze(0)


def boundaries(lengths: Sequence[int]) -> dict[str, Any]:
    """The arguments that tell a model where the samples of a row lie."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        **{f"cu_seq_lens_{side}": ends for side in "qk"},
        **{f"max_length_{side}": max(lengths) for side in "qk"},
    }


def samples_in(inputs: dict[str, Any]) -> Samples | None:
    """Those that a model's arguments tell of; None where the rows are not packed."""
    ends = inputs.get("cu_seq_lens_q")
    return None if ends is None else Samples.of(ends, int(inputs["max_length_q"]))


def prepare_for_packing(model: PreTrainedModel, language_model: str) -> None:
    """Make the language model, a part of the model, take packed rows; others go on as they did.

    Linear attention is one of the model's layers already (see `linear_attention`); here the other attention learns it.
    """
    part: Any = model.get_submodule(language_model)
    if not is_flash_attention_requested(part.config):
        part.set_attn_implementation(APART)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA of [batch, heads, length, width], and of a packed row's samples each by itself."""
    samples = samples_in(options)
    if samples is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (samples.apart(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value))
    # What fills a row up stands behind its sample, which therefore never sees it.
    attended, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    return samples.together(attended), None


def _mask(*sizes: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    mask: Any = sdpa_mask
    return None if attention_mask is None else mask(*sizes, attention_mask=attention_mask, **options)


AttentionInterface.register(APART, _attention)
AttentionMaskInterface.register(APART, _mask)
