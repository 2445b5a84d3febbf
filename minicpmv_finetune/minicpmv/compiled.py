"""Loops over pixels and states, compiled by numba when they are first used.

Their arithmetic is too irregular for array operations without a copy for each of them. The compiled code is kept beside
the source, so that later processes load it; where that folder cannot be written, each process compiles. numba compiles
again when the source changes, and not when only the options below do.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_WORTH_A_THREAD = 1_000_000  # elements; several times the time to start a thread while those of torch wait


@cache
def compile_loop(
    function: Callable[..., None],
    signatures: Sequence[str] = (),
    reorders_sums: bool = False,
    calls: Sequence[Callable[..., Any]] = (),
) -> Callable[..., None] | None:
    """Compile a function of arrays and numbers.

    Args:
        function: The function, in the part of Python that numba knows.
        signatures: The types of arguments to compile for, in numba's notation; by default those of each call.
        reorders_sums: Whether sums may be added in another order, which is faster and rounds differently.
        calls: The functions of its module that it calls.

    Returns:
        The compiled function; None where numba is not installed.
    """
    try:
        import numba
        from numba.extending import register_jitable
    except ImportError:
        return None

    types: Any = [*signatures] or None
    options: Any = {
        "nogil": True,
        "error_model": "numpy",  # x / 0 is infinity; to raise an error, a loop would divide one number at a time
        "fastmath": {"reassoc", "contract", "nsz"} if reorders_sums else False,
    }
    for called in calls:
        register_jitable(**options)(called)
    try:
        return numba.njit(types, cache=True, **options)(function)
    except RuntimeError:  # there is no writable folder for compiled code
        return numba.njit(types, **options)(function)


def loops_can_read(*tensors: "torch.Tensor") -> bool:
    """Whether tensors are in a CPU's memory, unlike those for estimates, and torch does not compile what uses them."""
    import torch  # not above, because steps without torch compile loops too

    return not torch.compiler.is_compiling() and all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors
    )


def run_in_threads(loop: Any, arguments: Sequence[Any], parts: int, work: int) -> None:
    """Run a compiled loop in as many threads as torch uses, each over some of the parts; little work in this one.

    Args:
        loop: The compiled loop, whose last two arguments are the first part and the one behind the last.
        arguments: Its other arguments; tensors are passed as arrays.
        parts: The number of parts of the work, which can be computed at the same time.
        work: The number of elements that are computed.
    """
    import torch

    arrays = [part.detach().numpy() if isinstance(part, torch.Tensor) else part for part in arguments]
    threads = min(torch.get_num_threads(), parts, work // _WORTH_A_THREAD)
    if threads <= 1:
        loop(*arrays, 0, parts)
        return
    ends = [parts * number // threads for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first, last: loop(*arrays, first, last), ends, ends[1:]))
