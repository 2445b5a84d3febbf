"""Loops over pixels and states, compiled by numba when they are first used.

Their arithmetic is too irregular for array operations without a copy for each of them. The compiled code is kept beside
the source, so that later processes load it; where that folder cannot be written, each process compiles.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any


@cache
def compile_loop(
    function: Callable[..., None], signatures: Sequence[str] = (), reorders_sums: bool = False
) -> Callable[..., None] | None:
    """Compile a function of arrays and numbers.

    Args:
        function: The function, in the part of Python that numba knows.
        signatures: The types of arguments to compile for, in numba's notation; by default those of each call.
        reorders_sums: Whether sums may be added in another order, which is faster and rounds differently.

    Returns:
        The compiled function; None where numba is not installed.
    """
    try:
        import numba
    except ImportError:
        return None

    types: Any = [*signatures] or None
    rounding: Any = {"reassoc", "contract", "nsz"} if reorders_sums else False
    try:
        return numba.njit(types, cache=True, nogil=True, fastmath=rounding)(function)
    except RuntimeError:  # there is no writable folder for compiled code
        return numba.njit(types, nogil=True, fastmath=rounding)(function)
