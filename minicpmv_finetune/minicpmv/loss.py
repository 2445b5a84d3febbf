"""Cross entropy where something is to be learnt, and logits nowhere else.

Of a sample's positions few are supervised: images, questions and padding are most of it. The head is the widest layer
of the model (150,000 words), so the logits of all positions are often more memory than all else of a step. Here the
head sees the supervised positions alone, and never more of them at once than `LOGITS_AT_ONCE` allows; those of a head
that is trained, or has adapters, are computed again in the backward pass where they are more than one chunk.

A frozen head needs no logits but once, and not at one time: softmax(states · weightᵀ) · weight, which its gradient is
made of, is attention from states to words, and the loss is what that divides by. So it goes through the vocabulary in
tiles, as flash attention goes through keys (Milakov and Gimelshein 2018; Dao et al. 2022): both in one pass, of logits
that are still in a processor's cache when they are multiplied again. On one core, 400 positions, 150,000 words and
width 256: 0.75 s, where chunks of whole rows took 0.89 and the two products of whole rows alone 0.80.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from .model_input import IGNORED_LABEL

LOGITS_AT_ONCE = 2**26
"""Of one chunk: 256 MB in float32, four hundred positions of a vocabulary of 150,000."""

WORDS_AT_ONCE = 2**12
"""Of a frozen head's tile, at most. On a CPU 1,024 to 8,192 are alike within a tenth; a GPU wants few, large ones."""


@dataclass
class SupervisedOutput(ModelOutput):
    """What a forward pass with `loss_only` gives.

    Attributes:
        loss: as the plain path has it.
        likeliest: [batch, length], the token that each supervised position would say, shifted as logits are: the
            position before a label speaks it; -100 elsewhere. None in training.
    """

    loss: torch.Tensor | None = None
    likeliest: torch.Tensor | None = None


def mask_that_hides(mask: torch.Tensor | None, attention: str) -> torch.Tensor | None:
    """The attention mask, or None where causal attention hides all padding by itself: behind a row's last token.

    Without a mask attention takes its causal kernels, which leave the half that is hidden uncomputed: 0.28 to 0.25 s a
    step on four photographs (benchmarks/peers.py's model, two cores). Flash attention cuts padding off by the mask, and
    keeps it.

    Args:
        mask: [batch, length], 1 for tokens, 0 for padding on one side of them; or any other, which is returned.
        attention: the implementation's name.
    """
    if mask is None or mask.dim() != 2 or attention.startswith("flash"):
        return mask
    return None if bool(mask[:, 0].all()) else mask


def supervised_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocabulary: int,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> SupervisedOutput:
    """The loss of a causal language model, from its last hidden states.

    Args:
        head: the module that makes logits, whatever adapters are on it.
        hidden: [batch, length, width].
        labels: [batch, length], not shifted, -100 where nothing is learnt.
        vocabulary: number of logits of a position.
        num_items_in_batch: the sum is divided by this; by default by the number of supervised positions.

    Returns:
        The loss and, without gradients, the likeliest tokens.
    """
    targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:].to(hidden.device)
    supervised = targets != IGNORED_LABEL
    states, wanted = hidden[supervised], targets[supervised]
    learns = torch.is_grad_enabled()
    divisor = len(wanted) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.to(hidden.device)
    if learns and len(states) and _is_frozen(head):
        total: torch.Tensor = _FrozenHeadLoss.apply(states, head.weight, wanted)
        return SupervisedOutput(loss=total / divisor)

    # ZeRO-3 gathers the head at each call, in which all processes take part: their calls must be equally many.
    chunk = max(len(states), 1) if is_deepspeed_zero3_enabled() else max(LOGITS_AT_ONCE // vocabulary, 1)

    def of_chunk(states: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(states)
        loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
        return loss, wanted if learns else logits.argmax(dim=-1)

    # A batch that teaches nothing has one chunk too, an empty one: the head's gradients are waited for.
    parts = list(zip(states.split(chunk), wanted.split(chunk), strict=True))
    again = learns and len(parts) > 1
    results = [checkpoint(of_chunk, *part, use_reentrant=False) if again else of_chunk(*part) for part in parts]
    total = torch.stack([loss for loss, _ in results]).sum()
    output = SupervisedOutput(loss=total / divisor)
    if not learns:
        said = torch.cat([likeliest for _, likeliest in results])
        output.likeliest = torch.full_like(targets, IGNORED_LABEL).masked_scatter(supervised, said)
    return output


def _is_frozen(head: Callable[[torch.Tensor], torch.Tensor]) -> TypeGuard[torch.nn.Linear]:
    """Whether a head is a plain matrix that nothing is trained on, whole on this process."""
    plain = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    return plain and not is_deepspeed_zero3_enabled()


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross entropy through a frozen matrix: d loss / d states = (softmax(logits) - one hot) · weight."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        labels = wanted.unsqueeze(1)
        # Of each position: the label's logit, the largest one of the words so far, and of these words the sums of
        # exp(logit - largest) and of that times their weights.
        wished = states.new_zeros(len(states), 1, dtype=torch.float32)
        largest = torch.full_like(wished, -torch.inf)
        whole = torch.zeros_like(wished)
        gradient = torch.zeros_like(states, dtype=torch.float32)
        size = max(min(WORDS_AT_ONCE, LOGITS_AT_ONCE // len(states)), 1)
        for number, words in enumerate(weight.split(size)):
            logits = F.linear(states, words).float()
            place = labels - number * size
            here = (place >= 0) & (place < len(words))
            wished = wished.where(~here, logits.gather(1, place.clamp(0, len(words) - 1)))
            larger = largest.maximum(logits.amax(dim=1, keepdim=True))
            shares, shrunk = logits.sub_(larger).exp_(), (largest - larger).exp_()
            whole.mul_(shrunk).add_(shares.sum(dim=1, keepdim=True))
            gradient.mul_(shrunk).add_(shares.to(words.dtype) @ words)
            largest = larger
        gradient.div_(whole).sub_(weight[wanted])
        loss = (whole.log() + largest - wished).sum()
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (ctx.saved_tensors[0] * gradients[0]).to(ctx.dtype), None, None
