"""The memory of a training on the CPU: what a step frees, the next one uses again.

glibc returns a large tensor to Linux as soon as it is freed, and Linux fills the pages of the next one with zeros, one
after the other. A step frees and asks for the same gigabytes each time. On a GPU torch keeps them itself.
"""

import ctypes
import os

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}

_KEPT = 2**31 - 1  # bytes that are free at the end of the heap, at most; the largest that glibc accepts here
_LARGEST = 2**30  # bytes of a tensor that is part of the heap; a larger one is returned as before


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for this process, unless a user has set one of its variables for that.

    Where another library allocates memory, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not os.environ.keys() & _VARIABLES:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
