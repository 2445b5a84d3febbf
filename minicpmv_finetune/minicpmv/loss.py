"""Cross entropy at supervised positions only, without logits for any other position.

Few positions of a sample are supervised: most are images, questions and padding. The head is the widest layer of the
model (150,000 vocabulary entries), so the logits of all positions often need more memory than the rest of a training
step. Here the head computes logits for supervised positions only, and for no more positions at a time than
`MAX_LOGITS` allows. If the head is trained or has adapters and the positions need more than one chunk, the logits of
each chunk are computed a second time in the backward pass.

A frozen head needs each logit only once, and never all logits at the same time: the gradient with respect to the hidden
states contains softmax(states · weightᵀ) · weight, which is attention with the states as queries and the vocabulary as
keys and values, and the loss needs the denominator of the same softmax. Therefore the vocabulary is processed in tiles,
as flash attention processes keys (Milakov and Gimelshein 2018; Dao et al. 2022): loss and gradient need one pass, and
the logits of a tile are still in the processor's cache for the second product. On one core with 400 positions, 150,000
vocabulary entries and width 256 this takes 0.75 s; chunks of positions with all their logits took 0.89 s, and the two
matrix products without anything else 0.80 s.
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

MAX_LOGITS = 2**26
"""Largest number of logits in one chunk: 256 MB in float32, about 450 positions with a vocabulary of 150,000."""

MAX_TILE_WIDTH = 2**12
"""Largest number of vocabulary entries in a tile of a frozen head.

On a CPU, widths from 1,024 to 8,192 differ by less than a tenth; a GPU is faster with few, large tiles.
"""


@dataclass
class SupervisedOutput(ModelOutput):
    """Output of a forward pass with `loss_only`.

    Attributes:
        loss: The same loss as without `loss_only`.
        predicted_ids: [batch, length], the token with the largest logit at each supervised position, -100 at all other
            positions. Positions are shifted as logits are: the prediction of a label is at the position before the
            label. None in training.
    """

    loss: torch.Tensor | None = None
    predicted_ids: torch.Tensor | None = None


def drop_redundant_mask(mask: torch.Tensor | None, attention: str) -> torch.Tensor | None:
    """Return the attention mask, or None if causal attention hides all padding anyway: padding after the last token.

    Without a mask, attention uses its causal kernels, which do not compute the hidden half: 0.25 s instead of 0.28 s
    for a step on four photographs (the model of benchmarks/peers.py, two cores). Flash attention removes padding by the
    mask, so it keeps the mask.

    Args:
        mask: [batch, length], 1 for tokens, 0 for padding on one side of them; a mask of any other shape is returned.
        attention: Name of the attention implementation.
    """
    if mask is None or mask.dim() != 2 or attention.startswith("flash"):
        return mask
    return None if bool(mask[:, 0].all()) else mask


def supervised_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> SupervisedOutput:
    """Compute the loss of a causal language model from its last hidden states.

    Args:
        head: The module that computes logits, with or without adapters.
        hidden_states: [batch, length, width].
        labels: [batch, length], not shifted, -100 at positions that are not supervised.
        vocab_size: Number of logits of a position.
        num_items_in_batch: Divisor of the summed loss; by default the number of supervised positions.

    Returns:
        The loss; without gradients also the predicted tokens.
    """
    targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:].to(hidden_states.device)
    supervised = targets != IGNORED_LABEL
    # Their number must be known here, so a GPU is waited for once; an index by the mask would wait four times.
    positions = supervised.flatten().nonzero().squeeze(1)
    states = hidden_states.flatten(0, 1).index_select(0, positions)
    target_ids = targets.flatten().index_select(0, positions)
    needs_gradient = torch.is_grad_enabled()
    divisor = len(target_ids) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.to(hidden_states.device)
    is_divided = _is_divided(head)
    if needs_gradient and len(states) and _is_frozen(head):
        if is_divided:
            head.unshard()  # FSDP gives the weight back after the backward pass
        total: torch.Tensor = _FrozenHeadLoss.apply(states, head.weight, target_ids)
        return SupervisedOutput(loss=total / divisor)

    # All processes together gather a divided head's weights at each call, so all must make equally many calls.
    chunk_size = max(len(states), 1) if is_divided else max(MAX_LOGITS // vocab_size, 1)

    def chunk_loss(states: torch.Tensor, target_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(states)
        loss = F.cross_entropy(logits.float(), target_ids, reduction="sum")
        return loss, target_ids if needs_gradient else logits.argmax(dim=-1)

    # A batch without supervised positions still has one, empty, chunk: other processes wait for the head's gradients.
    chunks = list(zip(states.split(chunk_size), target_ids.split(chunk_size), strict=True))
    recompute = needs_gradient and len(chunks) > 1
    results = [
        checkpoint(chunk_loss, *chunk, use_reentrant=False) if recompute else chunk_loss(*chunk) for chunk in chunks
    ]
    total = torch.stack([loss for loss, _ in results]).sum()
    output = SupervisedOutput(loss=total / divisor)
    if not needs_gradient:
        predicted = torch.cat([ids for _, ids in results])
        output.predicted_ids = torch.full_like(targets, IGNORED_LABEL).masked_scatter(supervised, predicted)
    return output


def _is_divided(head: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether each process has a part of a head's weights."""
    if is_deepspeed_zero3_enabled():
        return True
    return torch.distributed.is_available() and torch.distributed.is_initialized() and _is_fsdp_module(head)


def _is_fsdp_module(head: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(head, FSDPModule)


def _is_frozen(head: Callable[[torch.Tensor], torch.Tensor]) -> TypeGuard[Any]:
    """Whether a head is a single matrix that is not trained, has no adapter, and can be complete on this process."""
    if is_deepspeed_zero3_enabled() or not isinstance(head, torch.nn.Linear):
        return False
    # FSDP gives what it divides a class that is derived from the original one.
    classes = type(head).__bases__ if _is_divided(head) else (type(head),)
    return torch.nn.Linear in classes and head.bias is None and not head.weight.requires_grad


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross entropy of a frozen head; d loss / d states = (softmax(logits) - one_hot(targets)) · weight."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        target_column = target_ids.unsqueeze(1)
        # The state of the online softmax for each position: the logit of its target, the maximum of the logits so far,
        # the sum of exp(logit - maximum), and the sum of exp(logit - maximum) · weight.
        target_logit = states.new_zeros(len(states), 1, dtype=torch.float32)
        running_max = torch.full_like(target_logit, -torch.inf)
        running_sum = torch.zeros_like(target_logit)
        grad_states = torch.zeros_like(states, dtype=torch.float32)
        width = max(min(MAX_TILE_WIDTH, MAX_LOGITS // len(states)), 1)
        for number, tile in enumerate(weight.split(width)):
            logits = F.linear(states, tile).float()
            column = target_column - number * width
            in_tile = (column >= 0) & (column < len(tile))
            target_logit = target_logit.where(~in_tile, logits.gather(1, column.clamp(0, len(tile) - 1)))
            new_max = running_max.maximum(logits.amax(dim=1, keepdim=True))
            exps, rescale = logits.sub_(new_max).exp_(), (running_max - new_max).exp_()
            running_sum.mul_(rescale).add_(exps.sum(dim=1, keepdim=True))
            grad_states.mul_(rescale).add_(exps.to(tile.dtype) @ tile)
            running_max = new_max
        grad_states.div_(running_sum).sub_(weight[target_ids])
        loss = (running_sum.log() + running_max - target_logit).sum()
        ctx.save_for_backward(grad_states)
        ctx.dtype = states.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_states,) = ctx.saved_tensors
        return (grad_states * grad_outputs[0]).to(ctx.dtype), None, None
