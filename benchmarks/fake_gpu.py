"""A GPU that computes nothing: tensors have shapes, types and a device, and every operation knows what it would do.

`FakeTensorMode` of torch refuses operations between devices. To this, `FakeGpu` adds what a training step needs: the
values of small integer tensors (token ids, masks, positions), from which shapes follow; the memory that the tensors of
the device would take; the places where the program would wait for the device; and the backward pass, which torch's own
engine does not run without a driver.
"""

import math
import sys
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

DEVICE = torch.device("cuda:0")
_BLOCK = 512  # bytes; the allocator of CUDA rounds up to a multiple of it
_MOST_VALUES = 2**21  # elements of a tensor whose values are kept
_LARGEST_HEAD_OF_FLASH = 256
_CAPABILITY = (9, 0)  # of Hopper
_VALUES = "known_values"  # attribute of a fake tensor; a weak reference would keep torch from moving parameters
_aten = torch.ops.aten
# Operations whose result has as many elements as the values say, so that the program waits for them.
_SHAPED_BY_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
}
# Operations that read a number from the device; the last one counts what a mask selects.
_READING = {_aten._local_scalar_dense.default, _aten.masked_scatter_backward.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class FakeGpu(TorchDispatchMode):
    """Memory, values and waiting points of everything that runs within `fake_gpu`.

    Attributes:
        memory: Bytes of all tensors that are alive on the device.
        peak: Largest value of `memory` since `reset_peak`.
        waits: Places where the program waited for the device, and how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = self.peak = 0
        self.waits: Counter[str] = Counter()
        self._storages: dict[int, Any] = {}

    def reset_peak(self) -> None:
        """Forget earlier peaks."""
        self.peak = self.memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        if self._waits(func, args, kwargs, given):
            self.waits[_place()] += 1
        if func is _aten._local_scalar_dense.default:
            return self._scalar(args[0])
        values = self._compute(func, args, kwargs, given)
        if func in _SHAPED_BY_VALUES:
            return self._with_values(values, given[0].device)
        if func is _aten.index.Tensor:
            args = (args[0], [self._positions(index) for index in args[1]])
            args = (args[0], _without_nesting(args[1]))
        result = func(*args, **kwargs)
        self._remember(func, result, values, args)
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def value_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a tensor, on the CPU, if they are known."""
        if not isinstance(tensor, FakeTensor):
            return tensor if tensor.device.type == "cpu" else None
        return getattr(tensor, _VALUES, None)

    def _scalar(self, tensor: torch.Tensor) -> Any:
        value = self.value_of(tensor)
        if value is not None:
            with _disable_current_modes():
                return value.item()
        return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1

    def _compute(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        """Run an operation on known values; None if some are not known."""
        known = [self.value_of(tensor) for tensor in given]
        if any(value is None or value.numel() > _MOST_VALUES for value in known):
            return None
        if not given and _numbers(args) > _MOST_VALUES:
            return None
        by_id = {id(tensor): value for tensor, value in zip(given, known, strict=True)}
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [by_id.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else _on_cpu(leaf) for leaf in leaves]
        cpu_args, cpu_kwargs = tree_unflatten(leaves, spec)
        with torch.no_grad(), _disable_current_modes():
            return func(*cpu_args, **cpu_kwargs)

    def _with_values(self, values: Any, device: torch.device) -> Any:
        if values is None:
            raise RuntimeError(f"{_place()}: the shape of a result depends on values that are not known.")

        def place(value: torch.Tensor) -> torch.Tensor:
            made = _aten.empty.memory_format(list(value.shape), dtype=value.dtype, device=device)
            setattr(made, _VALUES, value)
            self._count(made)
            return made

        return tree_map_only(torch.Tensor, place, values)

    def _positions(self, index: torch.Tensor | None) -> Any:
        """An index as it is, or the positions where a mask is true."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return index
        value = self.value_of(index)
        if value is None:
            raise RuntimeError(f"{_place()}: a mask whose values are not known is an index.")
        with _disable_current_modes():
            parts = value.nonzero(as_tuple=True)
        return [self._with_values(part, index.device) for part in parts]

    def _remember(self, func: Any, result: Any, values: Any, args: Any) -> None:
        found, kept = tree_flatten(result)[0], tree_flatten(values)[0]
        for number, tensor in enumerate(found):
            if not isinstance(tensor, FakeTensor):
                continue
            value = kept[number] if len(kept) == len(found) else None
            is_small = isinstance(value, torch.Tensor) and value.numel() <= _MOST_VALUES
            if is_small and (tensor.device.type == "cpu" or not tensor.is_floating_point()):
                setattr(tensor, _VALUES, value)
            elif func._schema.is_mutable:
                setattr(tensor, _VALUES, None)

    def _count(self, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, FakeTensor) or tensor.device.type != DEVICE.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._storages[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.memory += size
        self.peak = max(self.peak, self.memory)

    def _release(self, key: int, size: int) -> None:
        del self._storages[key]
        self.memory -= size

    def _waits(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> bool:
        on_device = any(tensor.device.type == DEVICE.type for tensor in given)
        if func in _COPIES:
            target = args[0].device if func is _aten.copy_.default else kwargs.get("device") or given[0].device
            source = given[-1].device
            is_free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            crosses = torch.device(target).type != source.type and DEVICE.type in (target.type, source.type)
            # To the CPU the program always waits; to the device it does not if it says so.
            return crosses and not (is_free and source.type == "cpu")
        if not on_device:
            return False
        if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if func is _aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        return func in _READING or func in _SHAPED_BY_VALUES


def _without_nesting(indices: list[Any]) -> list[Any]:
    flat: list[Any] = []
    for index in indices:
        flat += index if isinstance(index, list) else [index]
    return flat


def _numbers(args: Any) -> int:
    """An upper bound of the number of elements that a constructor makes."""
    size = next((argument for argument in args if isinstance(argument, list | tuple)), None)
    if size is None:
        return 0
    return math.prod(side for side in size if isinstance(side, int))


def _on_cpu(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _place() -> str:
    """File and function of the program that runs the present operation, outside torch and this file."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path != __file__ and not path.startswith("<"):
            return f"{'/'.join(Path(path).parts[-2:])}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class _Attention(TorchFunctionMode):
    """Chooses the kernel of scaled dot product attention as torch does on a GPU since Ampere."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (states.to(dtype) for states in (query, key, value))
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is None and is_half and query.shape[-1] <= _LARGEST_HEAD_OF_FLASH:
        width = query.shape[-1]
        padding = -width % 8
        padded = (
            torch.nn.functional.pad(states, (0, padding)) if padding else states for states in (query, key, value)
        )
        scale = width**-0.5 if scale is None else scale
        output = _aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return torch.as_tensor(output[..., :width])
    if enable_gqa:
        raise RuntimeError("Attention of grouped queries with a mask: torch would use its slowest kernel.")
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    needs_gradient = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    result = _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
    )
    return torch.as_tensor(result[0])


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """A context in which tensors on `DEVICE` are fake, autocast works for it, and `FakeGpu` keeps the books."""
    with ExitStack() as stack:
        enter: Callable[[Any], Any] = stack.enter_context
        enter(patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        enter(patch("torch.cuda.is_bf16_supported", return_value=True))
        # Fake tensors would count as a recording, in which transformers does not look at values.
        enter(patch("transformers.masking_utils.is_tracing", return_value=False))
        enter(patch("torch.cuda.get_device_capability", return_value=_CAPABILITY))
        # Moving a module swaps its parameters, which torch refuses where something refers to them weakly, as its own
        # fake mode does.
        enter(patch("weakref.getweakrefs", return_value=[]))
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        gpu = enter(FakeGpu())
        enter(_Attention())
        yield gpu


def backward(loss: torch.Tensor, keep: bool = True) -> None:
    """Compute the gradients of all leaves, in the order and with the memory of torch's engine.

    A node and what it saved are freed as soon as it has run, so nothing outside may refer to the graph.

    Args:
        loss: A scalar; it is detached here.
        keep: Whether leaves keep their gradients; otherwise each is freed at once, as where another process keeps it.
    """
    root: Any = loss.grad_fn
    waiting = _count_edges(root)
    gradients: dict[Any, list[Any]] = {root: [torch.ones_like(loss)]}
    loss.detach_()
    # The engine prefers the node that was made last, and leaves before all others.
    order = count()
    ready = [(0, next(order), root)]
    del root
    # Gradient checkpointing computes a layer once for each run of the engine.
    with torch.no_grad(), patch("torch._C._current_graph_task_id", return_value=uuid.uuid4().int >> 66):
        while ready:
            *_, node = heappop(ready)
            if type(node).__name__ != "AccumulateGrad":
                for following in _run_node(node, gradients, waiting):
                    heappush(ready, (-following._sequence_nr(), next(order), following))
                following = None
            elif keep:
                _accumulate(node.variable, _fitting(node, gradients.pop(node))[0])
            else:
                del gradients[node]
            del node


def _run_node(node: Any, gradients: dict[Any, list[Any]], waiting: dict[Any, int]) -> list[Any]:
    """Hand the gradients of a node on to the nodes behind it; returns those that have all of theirs."""
    ready = []
    results = _apply(node, _fitting(node, gradients.pop(node)))
    for (following, number), gradient in zip(node.next_functions, results, strict=True):
        if following is None:
            continue
        inputs = gradients.setdefault(following, [None] * len(following._input_metadata))
        if gradient is not None:
            inputs[number] = gradient if inputs[number] is None else inputs[number] + gradient
        waiting[following] -= 1
        if not waiting[following]:
            del waiting[following]
            ready.append(following)
    return ready


def _apply(node: Any, given: list[Any]) -> list[Any]:
    """Run a node of the graph; returns a gradient for each of its edges."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        results = node(*given)
        return list(results) if isinstance(results, tuple) else [results]
    results = node.apply(*given)
    results = results if isinstance(results, tuple) else (results,)
    # A function in Python returns something for each argument, and may return more, but only tensors have edges.
    needed = iter([result for result, is_needed in zip(results, node.needs_input_grad, strict=False) if is_needed])
    return [None if following is None else next(needed) for following, _ in node.next_functions]


def _count_edges(root: Any) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            counts[node] = counts.get(node, 0) + 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return counts


def _fitting(node: Any, gradients: list[Any]) -> list[Any]:
    """Gradients in the types and shapes of a node's outputs."""
    fitted = []
    for gradient, metadata in zip(gradients, node._input_metadata, strict=True):
        if gradient is not None:
            if gradient.device != metadata.device:
                raise RuntimeError(f"{node}: a gradient is on {gradient.device} and not on {metadata.device}.")
            gradient = gradient.sum_to_size(metadata.shape) if gradient.shape != metadata.shape else gradient
            gradient = gradient.to(metadata.dtype)
        fitted.append(gradient)
    return fitted


def _accumulate(parameter: torch.Tensor, gradient: torch.Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient.detach()
    else:
        parameter.grad += gradient
